//! The benchmark: this project side by side with iptables, with nftables, and with no redirection at all.
//!
//! | module | what |
//! |---|---|
//! | [`world`] | the pods of each arm |
//! | [`rules`] | what the netfilter arms write into pods |
//! | [`mesh`], [`proxies`], [`sink`] | who serves the connections, and who tells it which pods |
//! | [`load`], [`client`], [`listener`], [`protocol`] | clients and servers |
//! | [`traffic`] | measurements of connections, and the proof that an arm is what it claims to be |
//! | [`extra`] | destinations in turn, run time of programs, many pods and exclusions |
//! | [`nursery`], [`crowd`], [`enrollment`], [`scale`] | what enrollment takes, and what many pods cost |
//! | [`statistics`], [`targets`] | ratios with confidence intervals, and what they should be |
//! | [`machine`] | where it was measured, and what else ran there |
//! | [`run`], [`report`], [`plots`] | the order of it all, and what comes out |

pub mod client;
pub mod crowd;
pub mod enrollment;
pub mod extra;
pub mod listener;
pub mod load;
pub mod machine;
pub mod mesh;
pub mod nursery;
pub mod place;
pub mod plots;
pub mod protocol;
pub mod proxies;
pub mod report;
pub mod rules;
pub mod run;
pub mod scale;
pub mod sink;
pub mod statistics;
pub mod targets;
pub mod traffic;
pub mod world;
