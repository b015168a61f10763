//! Checks that container runtimes call our plugin.

use super::{Check, Requirements};
use redirect_agent::install::{self, PLUGIN};

pub(super) fn checks(requirements: &Requirements) -> Vec<Check> {
    const NAME: &str = "CNI chain";
    const INSTALL: &str =
        "redirect install, or the agent with --install-cni; in a container, name the host's directories";
    let found = match install::find(&requirements.chain) {
        Ok(found) => found,
        Err(error) => return vec![Check::warn(NAME, error.to_string(), INSTALL)],
    };
    let configuration = found.configuration.display();
    vec![match (found.chained, found.plugin) {
        (true, Ok(plugin)) => Check::ok(NAME, format!("{configuration} has {}", plugin.display())),
        (true, Err(problem)) => Check::broken(
            NAME,
            format!("{configuration} contains {PLUGIN}, and no pod starts: {problem}"),
            "redirect install installs the plugin, redirect install --remove removes it from the chain",
        ),
        (false, _) => Check::warn(
            NAME,
            format!(
                "{configuration}, which container runtimes use, has no {PLUGIN}: new pods are not enrolled before they start"
            ),
            INSTALL,
        ),
    }]
}
