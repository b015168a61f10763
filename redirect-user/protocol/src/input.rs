//! Reads files with a limit, because content from other processes must not exhaust the memory.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// A file's content; an error if it exceeds this many bytes.
pub fn read_file(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {most} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit_even_if_it_never_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, [7; 100]).unwrap();
        assert_eq!(read_file(&path, 100).unwrap(), [7; 100]);
        let endless = Path::new("/dev/zero");
        for (path, most) in [(&*path, 99), (endless, 1000)] {
            let error = read_file(path, most).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::FileTooLarge, "{}", path.display());
        }
        assert_eq!(read_file(&directory.path().join("none"), 9).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
