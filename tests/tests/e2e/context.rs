//! What the tests share: one session, and one node for those that do not disturb it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, anyhow, bail};
use libtest_mimic::{Completion, Failed, Trial};
use redirect_tests::session::{Binaries, Session};
use redirect_tests::{Families, Node, ProxyKind, Stack, signals};

/// What a test needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Root and the usual CNI plugins.
    Root,
    /// The binaries of this workspace too.
    Binaries,
    /// Podman, the image and the chart as well.
    Container,
}

/// What the tests share.
#[derive(Default)]
pub(crate) struct Context {
    session: Lazy<Session>,
    node: Lazy<Node>,
}

/// Something made on demand, once; a failure is remembered as well.
type Lazy<T> = Mutex<Option<Result<Arc<T>, String>>>;

impl Context {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// The session.
    pub(crate) fn session(&self) -> Result<Arc<Session>> {
        get(&self.session, || Session::start(Binaries::from_env()?))
    }

    /// The node that tests share. A test that stops something on its node takes one of its own.
    pub(crate) fn node(&self) -> Result<Arc<Node>> {
        get(&self.node, || Node::start(&self.session()?))
    }

    /// Skips the test unless a proxy of this kind runs. `reason` completes the sentence "needs the … proxy: …".
    pub(crate) fn needs(&self, kind: ProxyKind, reason: &'static str) -> Result<()> {
        if self.proxy()? == kind { Ok(()) } else { Err(Skip { kind, reason }.into()) }
    }

    /// The kind of the proxies.
    pub(crate) fn proxy(&self) -> Result<ProxyKind> {
        Ok(self.session()?.binaries().kind)
    }

    /// Ends everything; what is left although it should be gone.
    pub(crate) fn finish(&self) -> Result<Vec<String>> {
        drop(lock(&self.node).take());
        match lock(&self.session).take() {
            Some(Ok(session)) => session.leftovers(),
            _ => Ok(Vec::new()),
        }
    }
}

/// A test that does not concern the proxy that runs.
#[derive(Debug)]
struct Skip {
    kind: ProxyKind,
    reason: &'static str,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ProxyKind::Embedded => "the embedded proxy",
            ProxyKind::Ztunnel => "a ztunnel",
        };
        write!(f, "needs {kind}: {}", self.reason)
    }
}

impl std::error::Error for Skip {}

fn get<T>(place: &Lazy<T>, make: impl FnOnce() -> Result<Arc<T>>) -> Result<Arc<T>> {
    let mut place = lock(place);
    let made = place.get_or_insert_with(|| make().map_err(|error| format!("{error:#}")));
    made.clone().map_err(|error| anyhow!(error))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A test.
pub(crate) fn trial(
    context: &Arc<Context>,
    name: impl Into<String>,
    test: impl FnOnce(&Context) -> Result<()> + Send + 'static,
) -> Trial {
    trial_that_needs(Needs::Binaries, context, name, test)
}

/// A test with containers.
pub(crate) fn trial_in_container(
    context: &Arc<Context>,
    name: impl Into<String>,
    test: impl FnOnce(&Context) -> Result<()> + Send + 'static,
) -> Trial {
    trial_that_needs(Needs::Container, context, name, test)
}

/// A test that needs more or less than usual.
pub(crate) fn trial_that_needs(
    needs: Needs,
    context: &Arc<Context>,
    name: impl Into<String>,
    test: impl FnOnce(&Context) -> Result<()> + Send + 'static,
) -> Trial {
    let context = context.clone();
    Trial::ignorable_test(name, move || {
        signals::check()?;
        if let Err(error) = check(needs) {
            let reason = format!("{error:#}");
            if std::env::var("REDIRECT_E2E").is_ok_and(|value| value == "require") {
                return Err(Failed::from(reason));
            }
            return Ok(Completion::ignored_with(reason));
        }
        match test(&context) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => match error.downcast_ref::<Skip>() {
                Some(skip) => Ok(Completion::ignored_with(skip.to_string())),
                None => Err(Failed::from(format!("{error:#}"))),
            },
        }
    })
}

fn check(needs: Needs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root");
    }
    let plugins = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];
    if !plugins.iter().any(|directory| std::path::Path::new(directory).join("bridge").exists()) {
        bail!("needs the CNI plugins (bridge, host-local) in one of {plugins:?}");
    }
    if needs != Needs::Root {
        Binaries::from_env()?.check()?;
    }
    if needs == Needs::Container { crate::container::check() } else { Ok(()) }
}

/// One test for every kind of pod and every stack that such a pod can speak: `group::dual::v4_mapped` and so on.
pub(crate) fn for_every_kind(
    context: &Arc<Context>,
    group: &str,
    test: impl Fn(&Context, Families, Stack) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let kinds = Families::ALL.into_iter();
    let cases = kinds.flat_map(|families| families.stacks().map(move |stack| (families, stack)));
    let trial = |(families, stack): (Families, Stack)| {
        let name = format!("{group}::{}::{}", families.label(), stack.label());
        trial(context, name, move |context| test(context, families, stack))
    };
    cases.map(trial).collect()
}

/// One test for every stack, in dual-stack pods: `group::v4_mapped` and so on.
pub(crate) fn for_every_stack(
    context: &Arc<Context>,
    group: &str,
    test: impl Fn(&Context, Stack) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let trial = |stack: Stack| {
        trial(context, format!("{group}::{}", stack.label()), move |context| test(context, stack))
    };
    Stack::ALL.into_iter().map(trial).collect()
}
