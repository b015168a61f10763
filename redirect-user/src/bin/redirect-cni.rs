//! The CNI plugin; see [`redirect_user::cni`].

use std::process::ExitCode;

fn main() -> ExitCode {
    redirect_user::cni::main()
}
