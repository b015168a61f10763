//! What programs do when they panic: they end. The kernel goes on redirecting without an agent, and the next one adopts the pods
//! and repairs what was left half done, as after a crash of any other kind.

use std::panic;
use std::process;

/// From now on a panic of any thread ends the process, after it was reported: what the thread was in the middle of is not
/// known. A profile that aborts would do the same, but the libraries are built once, and tests need panics to unwind.
pub fn abort() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;
    use std::thread;

    use nix::libc::SIGABRT;

    const CHILD: &str = "REDIRECT_TEST_PANICS";

    #[test]
    fn a_panic_in_a_thread_ends_the_process() {
        if env::var_os(CHILD).is_some() {
            super::abort();
            let _ = thread::spawn(|| panic!("on purpose")).join();
            return;
        }
        let mut child = Command::new(env::current_exe().expect("a test has a path"));
        child.args(["--exact", "panics::tests::a_panic_in_a_thread_ends_the_process", "--nocapture"]);
        let output = child.env(CHILD, "1").output().expect("a test can run itself");
        assert_eq!(output.status.signal(), Some(SIGABRT), "{}", output.status);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("on purpose"), "{said}");
    }
}
