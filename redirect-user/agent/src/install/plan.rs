//! Plans the changes to a configuration directory, without touching it.

use super::chain::{Chain, is_list};
use super::directory::{Conf, Directory, original_of};
use super::error::Error;
use super::files::Attributes;
use super::{OWN_CONF, Options, PLUGIN};
use redirect_cni::SpecVersion;

/// A step. The directory works after each of them.
#[derive(Debug, PartialEq)]
pub(super) enum Op {
    /// Create or replace a file.
    Write { name: String, bytes: Vec<u8>, attributes: Attributes },
    /// Remove a file.
    Remove { name: String },
}

impl Op {
    /// The file's name.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Write { name, .. } | Self::Remove { name } => name,
        }
    }
}

/// The steps that put the plugin into the chain.
#[derive(Debug)]
pub(super) struct Plan {
    /// The configuration that has the plugin in the end.
    pub(super) target: String,
    pub(super) ops: Vec<Op>,
    pub(super) warnings: Vec<String>,
    versions: Vec<String>,
}

impl Plan {
    /// Whether the plugin supports the chain's versions.
    pub(super) fn check_versions(&self, supported: &[SpecVersion]) -> Result<(), Error> {
        let unknown =
            |version: &&String| !supported.iter().any(|supported| supported.as_str() == version.as_str());
        match self.versions.iter().find(unknown) {
            None => Ok(()),
            Some(found) => Err(Error::Version { file: self.target.clone(), found: found.clone() }),
        }
    }
}

/// Adds our entry as the options say.
pub(super) fn install(directory: &Directory, options: &Options) -> Result<Plan, Error> {
    let (conf, chain) = primary(directory, options)?;
    let wanted = chain.with(&options.entry());
    let target = if options.cni_own_conf { OWN_CONF.to_owned() } else { list_name(&conf.name) };

    let mut ops = Vec::new();
    let present = directory.get(&target).and_then(|conf| conf.chain.as_ref().ok());
    if present != Some(&wanted) {
        if target != conf.name && target != OWN_CONF && present.is_some_and(|present| !present.has(PLUGIN)) {
            return Err(Error::Ambiguous { conf: conf.name.clone(), conflist: target });
        }
        // Keeps the primary CNI's configuration, to restore it when the plugin is removed.
        if target != OWN_CONF && !chain.has(PLUGIN) {
            ops.push(conf.written_to(original_of(&conf.name)));
        }
        ops.push(Op::Write { name: target.clone(), bytes: wanted.text(), attributes: conf.attributes });
    }
    // While both exist, runtimes use the old one, which sorts first.
    let stale = if options.cni_own_conf { None } else { Some(conf.name.as_str()) };
    ops.extend(stale.filter(|name| *name != target).map(|name| Op::Remove { name: name.to_owned() }));
    if !options.cni_own_conf && directory.get(OWN_CONF).is_some() {
        ops.push(Op::Remove { name: OWN_CONF.into() });
    }
    let versions = chain.versions().into_iter().map(str::to_owned).collect();
    let warnings = warnings(directory, options, &target, chain);
    Ok(Plan { target, ops, warnings, versions })
}

/// Removes our entry from every configuration. A configuration that has not changed since is restored byte for byte,
/// under its original name.
pub(super) fn remove(directory: &Directory) -> Vec<Op> {
    let mut ops: Vec<Op> = directory.files.iter().flat_map(|conf| without(directory, conf)).collect();
    let kept = directory.originals.iter().map(|original| original_of(&original.name));
    ops.extend(kept.map(|name| Op::Remove { name }));
    ops
}

fn without(directory: &Directory, conf: &Conf) -> Vec<Op> {
    let name = conf.name.clone();
    if name == OWN_CONF {
        return vec![Op::Remove { name }];
    }
    let Some(chain) = conf.chain.as_ref().ok().filter(|chain| chain.has(PLUGIN)) else { return Vec::new() };
    let chain = chain.without();
    let original = directory.originals.iter().find(|original| list_name(&original.name) == name);
    match original {
        // We converted it to a list, and the primary CNI has written it again.
        Some(original) if original.name != name && directory.get(&original.name).is_some() => {
            vec![Op::Remove { name }]
        }
        Some(original) if original.chain.as_ref() == Ok(&chain) => {
            let restored = original.written_to(original.name.clone());
            if original.name == name { vec![restored] } else { vec![restored, Op::Remove { name }] }
        }
        _ => vec![Op::Write { name, bytes: chain.text(), attributes: conf.attributes }],
    }
}

impl Conf {
    /// The step that writes this content to a file.
    fn written_to(&self, name: String) -> Op {
        Op::Write { name, bytes: self.bytes.clone(), attributes: self.attributes }
    }
}

/// The configuration that the node has, or would have, without us.
fn primary<'a>(directory: &'a Directory, options: &Options) -> Result<(&'a Conf, &'a Chain), Error> {
    let valid = |conf: &'a Conf| Some((conf, conf.chain.as_ref().ok()?));
    let others = || directory.files.iter().filter(|conf| conf.name != OWN_CONF);
    if let Some(name) = &options.cni_conf_name {
        // We may have converted it to a list, and the primary CNI may have written it again since.
        let names = [name.clone(), list_name(name)];
        let found = names.iter().find_map(|name| directory.get(name).and_then(valid));
        return found.ok_or_else(|| Error::NoSuchConfiguration {
            name: name.clone(),
            directory: directory.path.clone(),
            invalid: directory.invalid(),
        });
    }
    let found = others().find_map(valid).ok_or_else(|| Error::NoConfiguration {
        directory: directory.path.clone(),
        invalid: directory.invalid(),
    })?;
    match others().next() {
        Some(first) if options.cni_own_conf && first.name.as_str() < OWN_CONF => {
            Err(Error::NotFirst { first: first.name.clone() })
        }
        _ => Ok(found),
    }
}

fn list_name(name: &str) -> String {
    if is_list(name) {
        return name.to_owned();
    }
    let stem = name.strip_suffix(".conf").or_else(|| name.strip_suffix(".json")).unwrap_or(name);
    format!("{stem}.conflist")
}

fn warnings(directory: &Directory, options: &Options, target: &str, chain: &Chain) -> Vec<String> {
    let mut warnings = Vec::new();
    let before = |conf: &&Conf| conf.name.as_str() < target && list_name(&conf.name) != target;
    for conf in directory.files.iter().filter(before).filter(|conf| conf.name != OWN_CONF) {
        warnings.push(match &conf.chain {
            Ok(_) => format!("container runtimes use {}, which comes before {target}", conf.name),
            Err(problem) => format!("{} {problem}; container runtimes may stop at it", conf.name),
        });
    }
    if chain.has("istio-cni") {
        warnings.push(
            "the chain contains istio-cni: if it serves an ambient mesh, two agents redirect the same \
             pods; keep it off this node"
                .to_owned(),
        );
    }
    let own = format!("{OWN_CONF}.cilium_bak");
    if options.cni_own_conf && directory.disabled_by_cilium.contains(&own) {
        warnings.push(format!("Cilium renamed {OWN_CONF} to {own}: {CILIUM}"));
    }
    warnings
}

/// The advice for Cilium.
pub(super) const CILIUM: &str =
    "Cilium owns the directory while its Helm value cni.exclusive is true; set cni.exclusive=false";

/// Whether Cilium wrote this chain.
pub(super) fn is_cilium_s(directory: &Directory, name: &str) -> bool {
    let chain = directory.get(name).and_then(|conf| conf.chain.as_ref().ok());
    chain.is_some_and(|chain| chain.has("cilium-cni"))
}
