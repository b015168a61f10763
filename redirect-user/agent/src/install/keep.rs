//! Watches the chain and repairs it when another process changes it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::directory::Directory;
use super::pace::Pace;
use super::plan::{CILIUM, is_cilium_s};
use super::{Error, Options, Outcome, install_once};
use crate::metrics::events::events;

/// Wait for bursts to end: a primary CNI copies plugins, then writes configurations.
const SETTLE: Duration = Duration::from_millis(100);

/// The interval of checks where inotify sees no changes: behind symbolic links, below new mounts.
const PERIOD: Duration = Duration::from_secs(30);

/// The retry interval while the chain can't be established.
const RETRY: Duration = Duration::from_secs(2);

/// Keeps the plugin in the chain until `stop` is true, and then leaves the chain as it is.
pub async fn keep(options: Options, mut stop: watch::Receiver<bool>) {
    let mut keeper = Keeper { options, pace: Pace::default(), complaint: None };
    loop {
        // The watch starts before the check, so that no change is missed in between.
        let changes = keeper.watch();
        let period = keeper.look().await;
        tokio::select! {
            () = wait(changes, period) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let pause = keeper.pace.wait(Instant::now()).max(SETTLE);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// `redirect install --watch`.
pub(super) async fn until_signal(options: Options) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    let keeper = tokio::spawn(keep(options, stopped));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    stop.send_replace(true);
    Ok(keeper.await?)
}

struct Keeper {
    options: Options,
    pace: Pace,
    /// The last logged error of the installation.
    complaint: Option<String>,
}

impl Keeper {
    /// Installs or repairs. Returns how long to wait for a change.
    async fn look(&mut self) -> Duration {
        let options = self.options.clone();
        let result = tokio::task::spawn_blocking(move || install_once(&options)).await;
        match result.unwrap_or_else(|error| Err(Error::read(Path::new("CNI chain"), io::Error::other(error))))
        {
            Ok(outcome) => {
                self.report(&outcome);
                PERIOD
            }
            Err(error) => {
                self.complain(error.to_string());
                RETRY
            }
        }
    }

    fn report(&mut self, outcome: &Outcome) {
        let configuration = outcome.configuration.display();
        if outcome.changed.is_empty() {
            if self.complaint.take().is_some() {
                tracing::info!(%configuration, "plugin is in the CNI chain");
            }
            return;
        }
        self.complaint = None;
        events().chain_repaired();
        let repairs = self.pace.repaired(Instant::now()) - 1;
        let changed: Vec<_> = outcome.changed.iter().map(|path| path.display().to_string()).collect();
        tracing::info!(%configuration, changed = changed.join(" "), repairs, "plugin is in the CNI chain");
        for warning in &outcome.warnings {
            tracing::warn!("{warning}");
        }
        if repairs >= 2 {
            let seconds = self.pace.wait(Instant::now()).as_secs();
            tracing::warn!(
                repairs,
                seconds,
                "another process repeatedly changes {configuration}; delaying the next repair{}",
                self.culprit(&outcome.configuration)
            );
        }
    }

    fn culprit(&self, configuration: &Path) -> String {
        let name = configuration.file_name().unwrap_or_default().to_string_lossy();
        match Directory::read(&self.options.directories.cni_conf_dir) {
            Ok(directory) if is_cilium_s(&directory, &name) => format!(". It is Cilium's: {CILIUM}"),
            _ => String::new(),
        }
    }

    fn complain(&mut self, complaint: String) {
        if self.complaint.as_ref() != Some(&complaint) {
            tracing::warn!("{complaint}");
            self.complaint = Some(complaint);
        }
    }

    /// A descriptor that becomes readable when configurations or plugins change.
    fn watch(&mut self) -> Option<AsyncFd<OwnedFd>> {
        let directories = [&self.options.directories.cni_conf_dir, &self.options.directories.cni_bin_dir];
        match changes(directories.map(AsRef::as_ref)) {
            Ok(changes) => Some(changes),
            Err(error) => {
                self.complain(format!("cannot watch the CNI chain, checking it every {PERIOD:?}: {error}"));
                None
            }
        }
    }
}

fn changes(directories: [&Path; 2]) -> io::Result<AsyncFd<OwnedFd>> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let flags = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF;
    for directory in directories {
        // A directory that does not exist yet shows up in its nearest existing parent.
        let mut places = directory.ancestors();
        places.find(|place| inotify.add_watch(*place, flags).is_ok());
    }
    let descriptor = inotify.as_fd().try_clone_to_owned()?;
    // SAFETY: an owned descriptor does not change until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

async fn wait(changes: Option<AsyncFd<OwnedFd>>, period: Duration) {
    let changed = async {
        match &changes {
            // The event's contents do not matter: everything is checked again, with a new watch.
            Some(changes) => drop(changes.readable().await),
            None => std::future::pending().await,
        }
    };
    let _ = tokio::time::timeout(period, changed).await;
}
