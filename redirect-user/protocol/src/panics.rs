//! Ends the process on a panic. The kernel keeps redirecting without an agent, and the next agent adopts the pods and repairs
//! unfinished work, as after any other crash.

use std::panic;
use std::process;

/// Ends the process after any thread's panic is reported, because the state of the thread's work is unknown. A profile
/// with `panic = "abort"` would do the same, but the libraries are built once, and tests need panics to unwind.
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
