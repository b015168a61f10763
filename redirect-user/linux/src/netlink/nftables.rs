//! nftables: lists of chains and rules, and changes in one transaction.

use std::io;

use rtnetlink::packet_core::{DefaultNla, Emitable as _, NLA_F_NESTED, NLM_F_DUMP};
pub use rtnetlink::packet_core::{NLM_F_APPEND as APPEND, NLM_F_CREATE as CREATE};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use super::exchange::Exchange;
use super::raw::{self, Raw};

/// `NFNL_SUBSYS_NFTABLES`
const SUBSYSTEM: u8 = 10;
/// `NFPROTO_INET`: both families.
const INET: u8 = 1;
/// `NFPROTO_UNSPEC`: any family.
const ANY: u8 = 0;

/// The used part of `enum nf_tables_msg_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A table.
    NewTable = 0,
    /// A table, with everything in it.
    DeleteTable = 2,
    /// A chain.
    NewChain = 3,
    /// A list of chains.
    GetChain = 4,
    /// A rule.
    NewRule = 6,
    /// A list of rules.
    GetRule = 7,
}

impl Kind {
    const fn number(self) -> u16 {
        u16::from_be_bytes([SUBSYSTEM, self as u8])
    }

    /// With `struct nfgenmsg`.
    fn message(self, family: u8, attributes: &[u8]) -> Raw {
        Raw::new(self.number(), [&[family, 0, 0, 0], attributes].concat())
    }
}

/// A socket in the namespace in which it was opened.
pub struct Nftables(Exchange);

/// `struct nfgenmsg`
const HEADER: usize = 4;

impl Nftables {
    /// A socket in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        Exchange::open(NETLINK_NETFILTER).map(Self)
    }

    /// The names of all chains.
    pub fn chains(&mut self) -> io::Result<Vec<String>> {
        const NAME: u16 = 3;
        let found = self.0.request::<Raw>(Kind::GetChain.message(ANY, &[]), NLM_F_DUMP)?;
        let name = |chain: &Raw| {
            let name = chain.attributes(HEADER).find(|attribute| attribute.kind() == NAME)?;
            Some(raw::text(name.value()))
        };
        Ok(found.iter().filter_map(name).collect())
    }

    /// Whether a chain of the `inet` family has rules.
    pub fn has_rules(&mut self, table: &str, chain: &str) -> io::Result<bool> {
        let of = [text(1, table), text(2, chain)].concat();
        match self.0.request::<Raw>(Kind::GetRule.message(INET, &of), NLM_F_DUMP) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            found => Ok(found?.iter().any(|found| found.kind() == Kind::NewRule.number())),
        }
    }

    /// Applies changes, with their flags and attributes, all or none.
    pub fn transact(&mut self, changes: &[(Kind, u16, Vec<u8>)]) -> io::Result<()> {
        /// `NFNL_MSG_BATCH_BEGIN`
        const BEGIN: u16 = 0x10;
        /// `NFNL_MSG_BATCH_END`
        const END: u16 = 0x11;
        let border = |kind| Raw::new(kind, vec![0, 0, 0, SUBSYSTEM]);
        let changes = changes.iter().map(|(kind, flags, of)| (kind.message(INET, of), *flags));
        self.0.transact(border(BEGIN), changes.collect(), border(END))
    }
}

/// An attribute with raw bytes.
#[must_use]
pub fn bytes(kind: u16, content: &[u8]) -> Vec<u8> {
    let attribute = DefaultNla::new(kind, content.into());
    let mut packed = vec![0; attribute.buffer_len()];
    attribute.emit(&mut packed);
    packed
}

/// An attribute that contains attributes.
#[must_use]
pub fn nested(kind: u16, content: &[u8]) -> Vec<u8> {
    bytes(kind | NLA_F_NESTED, content)
}

/// A string attribute.
#[must_use]
pub fn text(kind: u16, content: &str) -> Vec<u8> {
    bytes(kind, &[content.as_bytes(), &[0]].concat())
}

/// A 32-bit attribute.
#[must_use]
pub fn number(kind: u16, content: u32) -> Vec<u8> {
    bytes(kind, &content.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn attributes_are_padded_and_say_their_length() {
        assert_eq!(text(3, "abcd"), [9, 0, 3, 0, b'a', b'b', b'c', b'd', 0, 0, 0, 0]);
        assert_eq!(number(1, 1), [8, 0, 1, 0, 0, 0, 0, 1]);
        assert_eq!(nested(1, &number(2, 0))[..4], [12, 0, 1, 0x80]);
    }

    #[test]
    fn a_transaction_is_done_or_names_its_error() {
        let name = "a_transaction_is_done_or_names_its_error";
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            return redirect_testing::skip(name, "needs root");
        }
        let mut nftables = Nftables::open().unwrap();
        match nftables.chains() {
            // nfnetlink without nftables.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return redirect_testing::skip(name, "the kernel has no nftables");
            }
            chains => assert!(chains.unwrap().is_empty()),
        }
        let (table, chain) = (text(1, "ours"), [text(1, "ours"), text(3, "entrance")].concat());
        let rule =
            [text(1, "ours"), text(2, "entrance"), nested(4, &nested(1, &text(1, "notrack")))].concat();
        nftables
            .transact(&[(Kind::NewTable, CREATE, table.clone()), (Kind::NewChain, CREATE, chain)])
            .unwrap();
        assert_eq!(nftables.chains().unwrap(), ["entrance"]);
        assert!(!nftables.has_rules("ours", "entrance").unwrap());
        assert!(!nftables.has_rules("another", "entrance").unwrap());
        // The second change fails, so the first must not apply either.
        let another = (Kind::NewTable, CREATE, text(1, "another"));
        let missing = (Kind::DeleteTable, 0, text(1, "missing"));
        for changes in [[another.clone(), missing.clone()], [missing, another]] {
            let error = nftables.transact(&changes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
        }
        // More rules than fit in one packet.
        let rule = || (Kind::NewRule, CREATE | APPEND, rule.clone());
        nftables.transact(&std::iter::repeat_with(rule).take(1000).collect::<Vec<_>>()).unwrap();
        assert!(nftables.has_rules("ours", "entrance").unwrap());
        nftables.transact(&[(Kind::DeleteTable, 0, table)]).unwrap();
        assert!(nftables.chains().unwrap().is_empty());
    }
}
