//! Which proxy a run of tests is about.

use std::path::Path;

use anyhow::{Result, bail};

/// Names the kind where the name of the program does not tell it.
const VARIABLE: &str = "REDIRECT_PROXY_KIND";

/// What is known of a proxy: how it is started, and how its log is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyKind {
    /// `redirect proxy`.
    Embedded,
    /// An unmodified ztunnel, in its in-pod mode.
    Ztunnel,
}

impl ProxyKind {
    /// The kind of a program: what `REDIRECT_PROXY_KIND` says, else what its name begins with.
    pub fn of(program: &Path) -> Result<Self> {
        let named = std::env::var(VARIABLE).ok();
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match named.as_deref().unwrap_or(&name) {
            "embedded" => Ok(Self::Embedded),
            name if name.starts_with("redirect") => Ok(Self::Embedded),
            name if name.starts_with("ztunnel") => Ok(Self::Ztunnel),
            _ => bail!(
                "what kind of node proxy {} is cannot be told by its name: say {VARIABLE}=ztunnel or \
                 {VARIABLE}=embedded",
                program.display()
            ),
        }
    }

    /// How a pod's Kubernetes name is made from its part in a test and a number. A ztunnel without a control plane has to
    /// know the names before there are pods.
    #[must_use]
    pub fn pod_name(self, part: &str, number: u32) -> String {
        match self {
            Self::Embedded => format!("{part}-{number}"),
            Self::Ztunnel => super::ztunnel::pod_name(number),
        }
    }
}
