//! Splits a list of pods into as many packets as necessary.

use super::{PodReport, Reply, packet};

impl Reply {
    /// The replies to [`Request::Pods`](super::Request::Pods): at least one, all but the last with `more`.
    #[must_use]
    pub fn pods(reports: Vec<PodReport>) -> Vec<Self> {
        let parts = packet::split(reports.into_iter().map(fitting));
        let last = parts.len() - 1;
        parts.into_iter().enumerate().map(|(i, pods)| Self::Pods { pods, more: i < last }).collect()
    }
}

/// The report and its size as JSON with a comma. A report that exceeds a packet is reduced to the pod's identity:
/// one odd pod must not hide the others.
fn fitting(report: PodReport) -> (PodReport, usize) {
    let size = packet::size(&report);
    if size <= packet::ROOM {
        return (report, size);
    }
    let cut = PodReport {
        attachments: Vec::new(),
        addresses: Vec::new(),
        interfaces: Vec::new(),
        strayed: Vec::new(),
        unguarded: Vec::new(),
        proxy: Err(format!("this report of {size} bytes is too large to be shown in full")),
        ..report
    };
    let size = packet::size(&cut);
    (cut, size)
}

#[cfg(test)]
mod tests {
    use super::super::MAX_PACKET;
    use super::*;
    use crate::pod::PodIdentity;
    use crate::wire::PodState;

    fn report(name: &str, error_length: usize) -> PodReport {
        PodReport {
            pod: PodIdentity { name: name.into(), namespace: "shop".into(), ..PodIdentity::default() },
            attachments: Vec::new(),
            addresses: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
            netns_cookie: u64::MAX,
            captured: vec!["IPv4".into(), "IPv6".into()],
            interfaces: vec!["eth0".into()],
            strayed: Vec::new(),
            unguarded: Vec::new(),
            state: PodState::Waiting,
            proxy: Err("x".repeat(error_length)),
            since: 1,
            counters: Vec::new(),
        }
    }

    fn names(replies: &[Reply]) -> Vec<String> {
        let pods = replies.iter().flat_map(|reply| match reply {
            Reply::Pods { pods, .. } => pods.clone(),
            other => panic!("{other:?}"),
        });
        pods.map(|report| report.pod.name).collect()
    }

    #[test]
    fn no_pods_is_one_final_reply() {
        assert_eq!(Reply::pods(Vec::new()), [Reply::Pods { pods: Vec::new(), more: false }]);
    }

    #[test]
    fn many_pods_are_split_in_order_and_every_packet_fits() {
        let reports: Vec<_> = (0..2000).map(|i| report(&format!("pod-{i}"), i % 300)).collect();
        let expected: Vec<_> = reports.iter().map(|report| report.pod.name.clone()).collect();
        let replies = Reply::pods(reports);
        assert!(replies.len() > 2);
        assert_eq!(names(&replies), expected);
        for (i, reply) in replies.iter().enumerate() {
            assert_eq!(reply.is_final(), i == replies.len() - 1);
            packet::encode(reply).unwrap();
        }
    }

    #[test]
    fn an_oversized_report_is_cut_and_hides_nobody() {
        let replies = Reply::pods(vec![report("a", 10), report("huge", 2 * MAX_PACKET), report("z", 10)]);
        assert_eq!(names(&replies), ["a", "huge", "z"]);
        for reply in &replies {
            packet::encode(reply).unwrap();
        }
    }
}
