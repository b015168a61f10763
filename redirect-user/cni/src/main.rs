//! The CNI plugin; see [`redirect_cni`].

use std::process::ExitCode;

fn main() -> ExitCode {
    redirect_protocol::panics::abort();
    redirect_cni::main()
}
