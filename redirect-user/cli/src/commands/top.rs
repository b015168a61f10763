//! `redirect top`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use crate::top::Board;
use redirect_protocol::wire::{self, FlowFilter, FlowReport, Reply, Request, Status, client};

const PATIENCE: Duration = Duration::from_secs(10);

/// How often it looks.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Refresh interval, in seconds
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
    interval: u64,
    /// The agent's UNIX socket
    #[arg(long, default_value = wire::DEFAULT_SOCKET, env = "REDIRECT_SOCKET", value_name = "FILE")]
    socket: PathBuf,
}

/// Shows rates until q, Esc or Ctrl-C.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    // Before the terminal switches to full screen, so that a missing agent is a plain error message.
    status(&options.socket)?;
    let events = listen(options.socket.clone())?;
    let mut terminal = ratatui::try_init()?;
    let result = show(options, &events, &mut terminal);
    ratatui::restore();
    result
}

fn show(
    Options { interval, socket }: &Options,
    events: &Receiver<Heard>,
    terminal: &mut ratatui::DefaultTerminal,
) -> anyhow::Result<()> {
    let interval = Duration::from_secs(*interval);
    let mut board = Board::default();
    let mut last = Instant::now();
    loop {
        let (status, now) = (status(socket)?, Instant::now());
        let (mut flows, mut lost) = (Vec::new(), 0);
        for (more, missed) in events.try_iter() {
            flows.extend(more);
            lost += missed;
        }
        board.update(&status, &flows, lost, now - last);
        last = now;
        terminal.draw(|frame| board.draw(frame))?;
        while let Some(left) = interval.checked_sub(last.elapsed()) {
            if event::poll(left)? {
                let event = event::read()?;
                if is_end(&event) {
                    return Ok(());
                }
                terminal.draw(|frame| board.draw(frame))?;
            }
        }
    }
}

fn is_end(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press && (matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) || interrupt)
}

fn status(socket: &Path) -> anyhow::Result<Status> {
    match client::call(socket, &Request::Status, None, PATIENCE)?.pop() {
        Some(Reply::Status(status)) => Ok(*status),
        _ => anyhow::bail!("the agent at {} did not answer with its status", socket.display()),
    }
}

/// Events, and the number of missed ones.
type Heard = (Vec<FlowReport>, u64);

/// Receives events on a thread until this process ends. Events that the kernel side or the agent lost also count as missed.
fn listen(socket: PathBuf) -> anyhow::Result<Receiver<Heard>> {
    let (heard, events) = mpsc::channel();
    thread::Builder::new().name("events".into()).spawn(move || {
        let request = Request::Monitor { filter: FlowFilter::default() };
        // When the agent ends, so does the command, because it has no status to show any more.
        let _ = client::follow(&socket, &request, PATIENCE, |reply| {
            let Reply::Flows { flows, lost } = reply else { return ControlFlow::Break(()) };
            if heard.send((flows, lost)).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
    })?;
    Ok(events)
}
