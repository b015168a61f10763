//! `redirect top` shows what a live agent tells.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use redirect_tests::{Families, Monitor, Node, Stack};
use redirect_user::top::Board;

use crate::context::{Context, for_every_stack};
use crate::outbound;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    for_every_stack(context, "top::rates_of_a_live_agent", rates)
}

/// Two connections in what counts as four seconds.
fn rates(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, server) = (node.enrolled("pod", Families::Dual)?, node.plain("server", Families::Dual)?);
    let monitor = Monitor::start(&node, &["--pod", &pod.identity().uid])?;
    let mut board = Board::default();
    board.update(&node.status()?, &[], 0, Duration::from_secs(1));
    for _ in 0..2 {
        outbound::passes_the_proxy_once(&pod, &server, stack)?;
    }
    let steered = |flows: &[redirect_user::wire::FlowReport]| {
        flows.iter().filter(|flow| flow.direction == "outbound" && flow.verdict == "steered").count()
    };
    redirect_tests::wait::until_true("both connections", redirect_tests::wait::SOON, || {
        Ok(steered(&monitor.heard()) == 2)
    })?;
    board.update(&node.status()?, &monitor.heard(), 0, Duration::from_secs(4));
    let mut terminal = Terminal::new(TestBackend::new(120, 30))?;
    terminal.draw(|frame| board.draw(frame))?;
    let screen = terminal.backend().to_string();
    let shown = |name: &str| {
        let words = ["outbound", "steered", "enrolled", stack.family().name(), name];
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
