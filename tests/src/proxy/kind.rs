//! The kind of proxy under test.

use std::path::Path;

use anyhow::{Result, bail};

/// Sets the kind if the program's name does not show it.
const VARIABLE: &str = "REDIRECT_PROXY_KIND";

/// A kind of proxy determines how to start it, and how to read its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyKind {
    /// `redirect proxy`.
    Embedded,
    /// An unmodified ztunnel, in its in-pod mode.
    Ztunnel,
}

impl ProxyKind {
    /// The kind of a program: by `REDIRECT_PROXY_KIND`, or else by the prefix of its name.
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

    /// Makes a pod's Kubernetes name from its role in a test and a number. A ztunnel without a control plane has to know
    /// the names before the pods exist.
    #[must_use]
    pub fn pod_name(self, part: &str, number: u32) -> String {
        match self {
            Self::Embedded => format!("{part}-{number}"),
            Self::Ztunnel => super::ztunnel::pod_name(number),
        }
    }
}
