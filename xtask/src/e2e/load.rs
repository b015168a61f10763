//! Continuous connections from a pod to every kind of Service during changes of the agent.

use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};

use super::SAMPLES;
use super::cluster::{self, Cluster};

/// Connects in turn until told to stop. Each attempt has time for three SYNs. Prints the number of successes, and
/// each failure.
const SCRIPT: &str = r#"
rm -f /tmp/stop; good=0
while [ ! -e /tmp/stop ]; do
    for address in $0 $@; do
        heard=$(nc -w 10 "$address" 9000 </dev/null 2>&1)
        case $heard in hello*) good=$((good + 1)) ;; *) echo "$address: '$heard'" ;; esac
    done
done
echo "$good"
"#;

/// Running clients.
pub(super) struct Load<'a> {
    cluster: &'a Cluster<'a>,
    clients: Vec<(String, Child)>,
}

impl<'a> Load<'a> {
    /// From every sleep pod.
    pub(super) fn start(cluster: &'a Cluster<'a>) -> Result<Self> {
        let mut addresses = Vec::new();
        for service in cluster.list(SAMPLES, "services")? {
            let of_service = service["spec"]["clusterIPs"].as_array().into_iter().flatten();
            addresses.extend(of_service.filter_map(|address| address.as_str().map(str::to_owned)));
        }
        ensure!(addresses.len() > 1, "no Services: {addresses:?}");
        let mut clients = Vec::new();
        for pod in cluster.names(SAMPLES, "app=sleep")? {
            let mut exec = cluster.kubectl();
            exec.args(["exec", "-n", SAMPLES, &pod, "--", "sh", "-c", SCRIPT]).args(&addresses);
            exec.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            clients.push((pod, exec.spawn().context("cannot run kubectl")?));
        }
        Ok(Self { cluster, clients })
    }

    /// Ends it. Returns the number of connections; fails if one of them failed.
    pub(super) fn finish(self) -> Result<String> {
        let pods = self.clients.len();
        let mut all = 0;
        for (pod, client) in self.clients {
            cluster::output(self.cluster.kubectl().args([
                "exec",
                "-n",
                SAMPLES,
                &pod,
                "--",
                "touch",
                "/tmp/stop",
            ]))?;
            let output = client.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let lines: Vec<&str> = said.lines().collect();
            let Some((good, bad)) = lines.split_last() else {
                anyhow::bail!("{pod} said nothing: {}", String::from_utf8_lossy(&output.stderr));
            };
            ensure!(bad.is_empty(), "from {pod}, {} connections failed: {}", bad.len(), bad.join("; "));
            let good: usize = good.parse().with_context(|| format!("{pod} said {good}"))?;
            ensure!(good > 0, "{pod} made no connection");
            all += good;
        }
        Ok(format!("{all} connections from {pods} pods meanwhile, none failed"))
    }
}
