use super::*;
use crate::erofs::NodeKind;
use crate::testing::{Found, Tar, convert, read_back, seal};

fn layer(archive: &[u8]) -> std::collections::BTreeMap<String, Found> {
    let file = convert(archive, &Limits::default()).unwrap();
    read_back(&[&file])
}

#[track_caller]
fn refused(archive: &[u8], says: &str) {
    let error = convert(archive, &Limits::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains(says), "{error:?} doesn't say {says:?}");
}

fn xattr(found: &Found, name: &str) -> Option<Vec<u8>> {
    found
        .xattrs
        .iter()
        .find(|(n, _)| n.as_ref() == name.as_bytes())
        .map(|(_, value)| value.to_vec())
}

#[test]
fn layer_of_every_kind_is_read_back() {
    let long = "d".repeat(90) + "/" + &"n".repeat(200);
    let mut device = Tar::header(b"dev/blk", b'4', b"", 0, 5);
    device[329..337].copy_from_slice(b"0000403\0");
    device[337..345].copy_from_slice(b"1111740\0");
    seal(&mut device);
    let archive = Tar::new()
        .directory("./")
        .directory("dev/")
        .file("a", b"hello")
        .link("b", "./a")
        .symlink("c", "/anywhere/../at/all")
        .entry("dev/fifo", b'6', "", b"")
        .raw(&device)
        .pax(&[
            ("path", long.as_bytes()),
            ("mtime", b"-1.5"),
            ("uid", b"70000"),
            ("SCHILY.xattr.user.x", b"y\0z"),
        ])
        .file("short", &[7; 5000])
        .file("empty", b"")
        .end();

    let found = layer(&archive);

    assert_eq!(found["a"].content, b"hello");
    assert_eq!(
        (found["a"].number, found["a"].nlink),
        (found["b"].number, 2)
    );
    assert_eq!(found["c"].content, b"/anywhere/../at/all");
    assert_eq!(found["dev/fifo"].kind, NodeKind::Fifo);
    assert_eq!(found["dev/blk"].device, encode_device((0o403, 0o1111740)));
    let file = &found[&long];
    assert_eq!(
        (file.content.len(), file.mtime, file.uid),
        (5000, (-2, 500_000_000), 70000)
    );
    assert_eq!(xattr(file, "user.x").unwrap(), b"y\0z");
    assert!(xattr(&found[&"d".repeat(90)], "trusted.casemate.implied").is_some());
    assert!(xattr(&found["dev"], "trusted.casemate.implied").is_none());
    assert_eq!(found[""].nlink, 4);
    assert!(found["empty"].content.is_empty());
}

#[test]
fn layer_same_archive_gives_same_bytes() {
    let archive = Tar::new()
        .file("x", b"1")
        .directory("y")
        .file("y/z", &[3; 9000])
        .end();
    let read = |file: File| {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let [one, two] = [(); 2].map(|()| read(convert(&archive, &Limits::default()).unwrap()));
    assert_eq!(one, two);
}

#[test]
fn path_out_of_the_tree_is_refused_by_name() {
    for name in ["../x", "a/../../x", "a/..", "..", "./../x"] {
        refused(&Tar::new().file(name, b"").end(), name);
    }
    refused(&Tar::new().file("/etc/passwd", b"").end(), "/etc/passwd");
    refused(
        &Tar::new().link("x", "../../etc/shadow").end(),
        "../../etc/shadow",
    );
    refused(
        &Tar::new().symlink("a", "../..").file("a/x", b"").end(),
        "a/x",
    );
    refused(
        &Tar::new().symlink("a", "/etc").file("a/passwd", b"").end(),
        "a/passwd",
    );
    refused(
        &Tar::new()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/x", b"")
            .end(),
        "loop",
    );
    refused(
        &Tar::new().file("a", b"").file("a/x", b"").end(),
        "not a directory",
    );
    refused(&Tar::new().entry("./", b'2', "/", b"").end(), "root");
}

#[test]
fn absolute_path_when_allowed_lands_inside() {
    let limits = Limits {
        allow_absolute_paths: true,
        ..Limits::default()
    };
    let file = convert(&Tar::new().file("/etc/passwd", b"x").end(), &limits).unwrap();
    assert_eq!(read_back(&[&file])["etc/passwd"].content, b"x");
}

#[test]
fn symlinked_parent_inside_the_tree_is_followed() {
    let found = layer(
        &Tar::new()
            .directory("usr/bin")
            .symlink("bin", "usr/bin")
            .file("bin/ls", b"x")
            .end(),
    );
    assert_eq!(found["usr/bin/ls"].content, b"x");
}

#[test]
fn whiteouts_become_overlay_marks() {
    let archive = Tar::new()
        .file("dir/.wh.gone", b"")
        .directory("full/")
        .file("full/.wh..wh..opq", b"")
        .file("full/new", b"")
        .file(".wh..wh.plnk", b"")
        .file(".wh.again", b"ignored bytes")
        .directory("again/")
        .file("kept", b"here")
        .file(".wh.kept", b"")
        .end();
    let found = layer(&archive);
    assert_eq!(
        (found["dir/gone"].kind, found["dir/gone"].device),
        (NodeKind::Char, 0)
    );
    assert!(xattr(&found["full"], "trusted.overlay.opaque").is_some());
    assert!(xattr(&found["again"], "trusted.overlay.opaque").is_some());
    assert_eq!(found["kept"].content, b"here");
    assert!(!found.keys().any(|path| path.contains(".wh.")));
}

#[test]
fn whiteout_oddities_are_refused() {
    for name in [".wh.", ".wh..", ".wh...", "a/.wh."] {
        refused(&Tar::new().file(name, b"").end(), "whiteout");
    }
    refused(&Tar::new().file(".wh.a/b", b"").end(), "whiteout");
}

#[test]
fn marks_cannot_be_smuggled_in() {
    let records: [(&str, &[u8]); 3] = [
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.trusted.casemate.implied", b"y"),
        ("SCHILY.xattr.trusted.other", b"kept"),
    ];
    let found = layer(&Tar::new().pax(&records).directory("d/").end());
    assert_eq!(found["d"].xattrs.len(), 1);
    assert!(xattr(&found["d"], "trusted.other").is_some());
}

#[test]
fn duplicate_entries_the_last_one_counts() {
    let archive = Tar::new()
        .file("x", b"1")
        .link("y", "x")
        .file("x", b"22")
        .directory("z")
        .file("z", b"3")
        .end();
    let found = layer(&archive);
    assert_eq!(
        (&*found["x"].content, &*found["y"].content, found["y"].nlink),
        (&b"22"[..], &b"1"[..], 1)
    );
    assert_eq!(found["z"].kind, NodeKind::Regular);
}

#[test]
fn truncated_archives_are_refused() {
    let whole = Tar::new().file("x", &[1; 3000]).cut();
    for length in [1, 511, 513, 600, 3400] {
        assert!(
            convert(&whole[..length], &Limits::default()).is_err(),
            "{length}"
        );
    }
    // At an entry's end the archive may end: some writers leave the zeros out.
    assert!(convert(&whole, &Limits::default()).is_ok());
    assert!(convert(b"", &Limits::default()).is_ok());
}

#[test]
fn limits_are_kept() {
    let many = (0..50)
        .fold(Tar::new(), |tar, n| tar.file(&format!("f{n}"), b""))
        .end();
    let limits = Limits {
        layer_entries: 40,
        ..Limits::default()
    };
    assert!(
        convert(&many, &limits)
            .unwrap_err()
            .to_string()
            .contains("layer_entries")
    );
    let limits = Limits {
        layer_metadata_bytes: 100,
        ..Limits::default()
    };
    assert!(
        convert(&many, &limits)
            .unwrap_err()
            .to_string()
            .contains("layer_metadata_bytes")
    );
    let limits = Limits {
        path_bytes: 20,
        ..Limits::default()
    };
    let deep = Tar::new().file("a/b/c/d/e/f/g/h/i/j/k/l", b"").end();
    assert!(
        convert(&deep, &limits)
            .unwrap_err()
            .to_string()
            .contains("path_bytes")
    );
    refused(
        &Tar::new()
            .pax(&[("path", "n".repeat(256).as_bytes())])
            .file("x", b"")
            .end(),
        "255",
    );
    let huge = Tar::header(b"x", b'L', b"", 1 << 30, 0);
    refused(
        &Tar::new()
            .raw(&{
                let mut h = huge;
                seal(&mut h);
                h
            })
            .end(),
        "extended header",
    );
}

#[test]
fn sparse_file_of_pax_1_0_keeps_its_holes() {
    let mut map = b"3\n0\n512\n1048576\n8192\n10485760\n0\n".to_vec();
    map.resize(512, 0);
    let data = [map, vec![1; 512], vec![2; 8192]].concat();
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"dir/sparse"),
        ("GNU.sparse.realsize", b"10485760"),
    ];
    let archive = Tar::new()
        .pax(&records)
        .file("GNUSparseFile.0/sparse", &data)
        .file("after", b"x")
        .end();
    let file = convert(&archive, &Limits::default()).unwrap();
    assert!(file.metadata().unwrap().len() < 1 << 20);
    let found = read_back(&[&file]);
    let content = &found["dir/sparse"].content;
    assert_eq!(content.len(), 10_485_760);
    assert!(
        content[..512].iter().all(|&b| b == 1) && content[512..1_048_576].iter().all(|&b| b == 0)
    );
    assert!(
        content[1_048_576..1_056_768].iter().all(|&b| b == 2)
            && content[1_056_768..].iter().all(|&b| b == 0)
    );
    assert_eq!(found["after"].content, b"x");
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    for map in [
        "1\n0\n999\n",
        "2\n5\n1\n0\n1\n",
        "1\n99999\n2\n",
        "9999999999\n",
        "x\n",
        "1\n-1\n2\n",
    ] {
        let mut data = map.as_bytes().to_vec();
        data.resize(512, 0);
        data.extend_from_slice(b"..");
        let records: [(&str, &[u8]); 3] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.realsize", b"1000"),
        ];
        refused(&Tar::new().pax(&records).file("s", &data).end(), "sparse");
    }
}

#[test]
fn chunk_bits_keep_the_index_small() {
    let at = |offset, length| Segment { offset, length };
    assert_eq!(chunk_bits(100, &[at(0, 10)]), 0);
    assert_eq!(chunk_bits(1 << 30, &[at(4096, 4096)]), 2);
    assert_eq!(chunk_bits(1 << 30, &[at(1 << 20, 1 << 20)]), 8);
    assert!((1u64 << 44).div_ceil(BLOCK << chunk_bits(1 << 44, &[at(1, 1)])) <= CHUNKS_MAX);
    assert_eq!(chunk_bits(8192, &[]), 1);
}
