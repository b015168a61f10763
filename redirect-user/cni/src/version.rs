//! The versions of the CNI specification.

use std::fmt;

use serde::Deserialize;

/// A supported version of the specification, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpecVersion {
    /// 0.3.0
    V0_3_0,
    /// 0.3.1
    V0_3_1,
    /// 0.4.0, with `CHECK`.
    V0_4_0,
    /// 1.0.0
    V1_0_0,
    /// 1.1.0, with `STATUS` and `GC`.
    V1_1_0,
}

impl SpecVersion {
    /// Every supported version.
    pub const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest supported version.
    pub const LATEST: Self = Self::V1_1_0;

    /// Its text in `cniVersion`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The configuration's version, if it is supported.
pub(super) fn peek(config: &[u8]) -> Option<SpecVersion> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Header {
        cni_version: String,
    }
    let header: Header = serde_json::from_slice(config).ok()?;
    SpecVersion::parse(&header.cni_version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_order_and_survive_the_journey() {
        assert!(SpecVersion::ALL.is_sorted());
        assert_eq!(SpecVersion::ALL.last(), Some(&SpecVersion::LATEST));
        for version in SpecVersion::ALL {
            assert_eq!(SpecVersion::parse(version.as_str()), Some(version));
        }
    }

    #[test]
    fn peeking_never_fails() {
        assert_eq!(peek(br#"{"cniVersion":"1.0.0","prevResult":7}"#), Some(SpecVersion::V1_0_0));
        for config in ["", "{}", "[]", "null", r#"{"cniVersion":1}"#, r#"{"cniVersion":"0.2.0"}"#] {
            assert_eq!(peek(config.as_bytes()), None, "{config}");
        }
    }
}
