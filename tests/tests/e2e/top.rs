//! `redirect top` shows the data of a live agent.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use redirect_cli::top::Board;
use redirect_tests::terminal::Pty;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Families, Monitor, Node, Stack};

use crate::context::{Context, for_every_stack};
use crate::outbound;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "top::rates_of_a_live_agent", rates);
    trials.extend(for_every_stack(context, "top::on_a_terminal", terminal));
    trials
}

/// Two connections within simulated four seconds.
fn rates(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, server) = (node.enrolled("pod", Families::Dual)?, node.plain("server", Families::Dual)?);
    let monitor = Monitor::start(&node, &["--pod", &pod.identity().uid])?;
    let mut board = Board::default();
    board.update(&node.status()?, &[], 0, Duration::from_secs(1));
    for _ in 0..2 {
        outbound::passes_the_proxy_once(&pod, &server, stack)?;
    }
    let captured = |flows: &[redirect_protocol::wire::FlowReport]| {
        flows.iter().filter(|flow| flow.direction == "outbound" && flow.verdict == "captured").count()
    };
    wait::until_true("both connections", SOON, || Ok(captured(&monitor.heard()) == 2))?;
    board.update(&node.status()?, &monitor.heard(), 0, Duration::from_secs(4));
    let mut terminal = Terminal::new(TestBackend::new(120, 30))?;
    terminal.draw(|frame| board.draw(frame))?;
    let screen = terminal.backend().to_string();
    let shown = |name: &str| {
        let words = ["outbound", "captured", "enrolled", stack.family().name(), name];
        let mut lines = screen.lines().filter(|line| words.iter().all(|word| line.contains(word)));
        lines.any(|line| {
            let figures: Vec<&str> =
                line.split_whitespace().filter(|word| word.parse::<f64>().is_ok()).collect();
            figures == ["0.5", "2"]
        })
    };
    ensure!(shown("") && shown(&pod.identity().to_string()), "{screen}");
    ensure!(screen.contains("node proxies: 1"), "{screen}");
    Ok(())
}

/// As users run it: it takes over the screen, shows a connection that is opened meanwhile, and restores the
/// screen.
fn terminal(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, server) = (node.enrolled("pod", Families::Dual)?, node.plain("server", Families::Dual)?);
    let mut command = Command::new(&node.session().binaries().redirect);
    command.arg("top").arg("--socket").arg(node.agent_socket()).env("TERM", "xterm-256color");
    let mut terminal = Pty::start(command)?;
    let shows = |terminal: &Pty, what: &str| {
        wait::until_true(what, SOON, || Ok(terminal.shown().contains(what))).with_context(|| terminal.shown())
    };
    shows(&terminal, "node proxies: 1")?;
    ensure!(terminal.is_full_screen());
    wait::until_true("listener", SOON, || Ok(node.status()?.flows.listeners == 1))?;
    outbound::passes_the_proxy_once(&pod, &server, stack)?;
    let row = |line: &str| {
        let words = [&pod.identity().to_string(), stack.family().name(), "outbound", "captured", "enrolled"];
        words.iter().all(|word| line.contains(*word))
    };
    wait::until_true("row of the pod", SOON, || Ok(terminal.shown().lines().any(row)))
        .with_context(|| terminal.shown())?;
    terminal.press("q")?;
    let status = terminal.wait()?;
    ensure!(status.success() && !terminal.is_full_screen(), "{status}: {}", terminal.shown());
    wait::until_true("no listener", SOON, || Ok(node.status()?.flows.listeners == 0))
}
