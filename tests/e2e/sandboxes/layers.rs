//! Layers are invisible but for their content.

use casemate_tests::{Host, Registry};

#[test]
fn images_of_1_20_and_100_layers_show_each_layers_files() {
    let host = Host::new();
    let registry = Registry::of_fixtures();
    for count in [1, 20, 100] {
        let image = registry.name(&format!("layered:{count}"));
        host.casemate(["pull", &image]).succeeds();
        let out = host.run([
            &image,
            "sh",
            "-c",
            "cat /layers/top 2>/dev/null; ls /layers 2>/dev/null | grep -c '^[0-9]'",
        ]);
        let files = count - 1;
        out.prints(&if files == 0 {
            "0\n".to_owned()
        } else {
            format!("{files}\n{files}\n")
        });
    }
    host.is_clean();
}

#[test]
fn cost_of_a_mount_does_not_grow_with_its_layers() {
    // Requests of the root disk are what a mount costs the host; they are exact where a time is not.
    let host = Host::new();
    let registry = Registry::of_fixtures();
    let sectors = |count: u32| -> u64 {
        let image = registry.name(&format!("layered:{count}"));
        host.casemate(["pull", &image]).succeeds();
        let out = host.run([&image, "awk", "{ print $3 }", "/sys/block/vda/stat"]);
        out.succeeds().word().parse().unwrap()
    };
    let (one, hundred) = (sectors(1), sectors(100));
    assert!(
        hundred <= one + one / 4,
        "{one} sectors with 1 layer, {hundred} with 100"
    );
}
