//! Locks between processes.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long another process may hold a lock.
const PATIENCE: Duration = Duration::from_secs(5);

const PAUSE: Duration = Duration::from_millis(20);

/// Locks a directory until the file is dropped. Any process that may open a directory can lock it for as long as it likes, so
/// after a few seconds this logs a warning and proceeds without the lock. Work under the lock must tolerate a second process.
pub fn of_directory(directory: &Path) -> io::Result<File> {
    within(directory, PATIENCE)
}

fn within(directory: &Path, patience: Duration) -> io::Result<File> {
    let file = File::open(directory)?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if began.elapsed() < patience => thread::sleep(PAUSE),
            Err(TryLockError::WouldBlock) => {
                let directory = directory.display();
                tracing::warn!(%directory, "another process keeps the directory locked; going on without the lock");
                return Ok(file);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_waited_for_but_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let held = of_directory(directory.path()).unwrap();
        let began = Instant::now();
        within(directory.path(), Duration::from_millis(100)).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(100));

        let (began, path) = (Instant::now(), directory.path().to_owned());
        let waiting = thread::spawn(move || within(&path, Duration::from_secs(3600)).unwrap());
        drop(held);
        let taken = waiting.join().unwrap();
        assert!(began.elapsed() < Duration::from_secs(3600));
        // It has the lock; others don't get it.
        let another = File::open(directory.path()).unwrap();
        assert!(matches!(another.try_lock(), Err(TryLockError::WouldBlock)));
        drop(taken);
        another.try_lock().unwrap();
    }
}
