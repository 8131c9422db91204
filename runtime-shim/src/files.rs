//! Files that others write, or have removed: what is read is bounded, what is gone is gone.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The whole file; one of more than `limit` bytes is refused, also if it tells no size, as a device or a pipe.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let why = format!("it is too large; at most {limit} bytes are accepted");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

/// The same for a text.
pub fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    String::from_utf8(read(path, limit)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

/// Replaces a file as a whole: who reads it sees the old or the new one, also after a death in between.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut whole = path.to_owned().into_os_string();
    whole.push(".new");
    std::fs::write(&whole, bytes)?;
    std::fs::rename(&whole, path)
}

/// What a removal came to, if there was nothing left to remove.
pub fn gone_is_fine(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_of_more_than_the_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "12345678").unwrap();
        assert_eq!(read(&path, 8).unwrap(), b"12345678");
        for (path, limit) in [(path.as_path(), 7), (Path::new("/dev/zero"), 4096)] {
            let error = read(path, limit).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
            assert!(error.to_string().contains(&limit.to_string()), "{error}");
        }
    }

    #[test]
    fn read_text_of_other_bytes_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [b'a', 0xff]).unwrap();
        assert_eq!(
            read_text(&path, 8).unwrap_err().to_string(),
            "it is not UTF-8"
        );
    }
}
