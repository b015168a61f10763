//! Changes of the chain by other processes are detected and repaired.

use std::time::Duration;

use tokio::sync::watch;

use super::*;

/// Runs a keeper while the caller makes changes and waits for their effects.
async fn with_keeper(host: &Host, act: impl AsyncFnOnce()) {
    let (stop, stopped) = watch::channel(false);
    let keeper = tokio::spawn(keep(host.options.clone(), stopped));
    act().await;
    stop.send_replace(true);
    keeper.await.unwrap();
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    // Well below the interval of periodic checks.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn is_chained(host: &Host, name: &str) -> bool {
    host.files().get(name).is_some_and(|content| content["plugins"][1]["type"] == PLUGIN)
        && host.options.directories.installed_plugin().exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_is_written_again() {
    let host = Host::new(&[("10-b.conflist", list())]);
    with_keeper(&host, async || {
        until("first", || is_chained(&host, "10-b.conflist")).await;
        // Written in place, as some programs do, and by renaming, as others do.
        host.write("10-b.conflist", &list());
        until("in place", || is_chained(&host, "10-b.conflist")).await;
        host.write("new", &list());
        fs::rename(host.path("new"), host.path("10-b.conflist")).unwrap();
        until("renamed", || is_chained(&host, "10-b.conflist")).await;
        // Another one sorts before it.
        host.write("05-a.conflist", &list());
        until("a new first one", || is_chained(&host, "05-a.conflist")).await;
    })
    .await;
    assert!(is_chained(&host, "05-a.conflist"), "the end of the keeper is not the end of the chain");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_is_removed_or_replaced() {
    let host = Host::new(&[("10-b.conflist", list())]);
    let content = || fs::read_to_string(host.options.directories.installed_plugin()).unwrap_or_default();
    with_keeper(&host, async || {
        until("first", || is_chained(&host, "10-b.conflist")).await;
        fs::remove_file(host.options.directories.installed_plugin()).unwrap();
        until("removed", || content() == PLUGIN_SCRIPT).await;
        fs::write(host.options.directories.installed_plugin(), "other").unwrap();
        until("replaced", || content() == PLUGIN_SCRIPT).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_cni_that_comes_later() {
    let host = Host::new(&[]);
    fs::remove_dir(&host.options.directories.cni_conf_dir).unwrap();
    with_keeper(&host, async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        fs::create_dir(&host.options.directories.cni_conf_dir).unwrap();
        // Incomplete at first.
        fs::write(host.path("10-b.conflist"), "{").unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        host.write("10-b.conflist", &list());
        until("late", || is_chained(&host, "10-b.conflist")).await;
    })
    .await;
}
