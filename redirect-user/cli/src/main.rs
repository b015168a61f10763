//! `redirect`: agent, embedded node proxy and command line of ambient-redirect.

fn main() -> std::process::ExitCode {
    redirect_protocol::panics::abort();
    redirect_cli::main()
}
