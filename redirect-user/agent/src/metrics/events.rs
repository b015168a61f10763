//! Counters of events in this process. There is one set, because a process runs one agent.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use redirect_zds::server;

/// The counters of this process.
pub fn events() -> &'static Events {
    static EVENTS: LazyLock<Events> = LazyLock::new(Events::new);
    &EVENTS
}

/// Counters of events in the agent.
#[derive(Debug)]
pub struct Events {
    enrollment: Family<Phase, Histogram>,
    cni: Family<Cni, Counter>,
    zds_connections: Counter,
    zds_answers: Family<Answer, Counter>,
    zds_failures: Family<Failure, Counter>,
    chain_repairs: Counter,
    watch_failures: Family<Watch, Counter>,
    patch_failures: Counter,
    refused_pods: Family<Refusal, Counter>,
    service_ends: Family<Service, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cni {
    command: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    answer: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failure {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Watch {
    resource: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refusal {
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Service {
    service: &'static str,
}

impl Events {
    fn new() -> Self {
        Self {
            // 0.25 ms to 8 s.
            enrollment: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.00025, 2.0, 16))
            }),
            cni: Family::default(),
            zds_connections: Counter::default(),
            zds_answers: Family::default(),
            zds_failures: Family::default(),
            chain_repairs: Counter::default(),
            watch_failures: Family::default(),
            patch_failures: Counter::default(),
            refused_pods: Family::default(),
            service_ends: Family::default(),
        }
    }

    /// Records the duration of a phase of an enrollment, that of the kernel or of the node proxy.
    pub(crate) fn enrolled(&self, phase: &'static str, took: Duration) {
        self.enrollment.get_or_create(&Phase { phase }).observe(took.as_secs_f64());
    }

    /// Counts an answered request of the CNI plugin.
    pub(crate) fn cni(&self, command: &'static str, result: &'static str) {
        self.cni.get_or_create(&Cni { command, result }).inc();
    }

    /// Counts an event on a node proxy's connection.
    pub(crate) fn zds(&self, event: server::Event) {
        match event {
            server::Event::Connected => self.zds_connections.inc(),
            server::Event::Answered { acknowledged } => {
                let answer = if acknowledged { "ack" } else { "nack" };
                self.zds_answers.get_or_create(&Answer { answer }).inc()
            }
            server::Event::Closed { reason } => self.zds_failures.get_or_create(&Failure { reason }).inc(),
        };
    }

    /// Counts a repair of the CNI chain.
    pub(crate) fn chain_repaired(&self) {
        self.chain_repairs.inc();
    }

    /// Counts a failed watch of the API server, which is restarted.
    pub(crate) fn watch_failed(&self, resource: &'static str) {
        self.watch_failures.get_or_create(&Watch { resource }).inc();
    }

    /// Counts a pod annotation that could not be written.
    pub(crate) fn patch_failed(&self) {
        self.patch_failures.inc();
    }

    /// Counts a pod that can't be enrolled.
    pub(crate) fn pod_refused(&self, reason: &str) {
        self.refused_pods.get_or_create(&Refusal { reason: reason.into() }).inc();
    }

    /// Initializes a service's counter of ends to zero: Prometheus sees no increase in a series that begins with one.
    pub(crate) fn service_begins(&self, service: &'static str) {
        drop(self.service_ends.get_or_create(&Service { service }));
    }

    /// Counts a service that ended before the agent.
    pub(crate) fn service_ended(&self, service: &'static str) {
        self.service_ends.get_or_create(&Service { service }).inc();
    }

    /// Registers the counters under their names.
    pub(super) fn register(&self, registry: &mut Registry) {
        let seconds = "Time to enroll a pod, by phase: the kernel, the node proxy's acknowledgment";
        registry.register_with_unit("enrollment_duration", seconds, Unit::Seconds, self.enrollment.clone());
        registry.register(
            "cni_requests",
            "Requests of the CNI plugin, by command and result",
            self.cni.clone(),
        );
        registry.register(
            "zds_connections",
            "Connections of node proxies since the agent started",
            self.zds_connections.clone(),
        );
        registry.register("zds_answers", "Answers of node proxies: ack or nack", self.zds_answers.clone());
        registry.register(
            "zds_failures",
            "Connections of node proxies that the agent closed, by reason",
            self.zds_failures.clone(),
        );
        registry.register(
            "cni_chain_repairs",
            "Insertions of the plugin into the CNI chain, first or repeated",
            self.chain_repairs.clone(),
        );
        registry.register(
            "kubernetes_watch_failures",
            "API server watches that failed and were restarted",
            self.watch_failures.clone(),
        );
        registry.register(
            "kubernetes_patch_failures",
            "Failed writes of pod annotations",
            self.patch_failures.clone(),
        );
        registry.register(
            "kubernetes_refused_pods",
            "Pods that cannot be enrolled, by reason",
            self.refused_pods.clone(),
        );
        registry.register(
            "service_ends",
            "Services of the agent that ended before it, by name",
            self.service_ends.clone(),
        );
    }
}
