use super::super::labels::EnableLabel;
use super::*;

fn rules() -> Rules {
    Rules { excluded: ["kube-system".to_owned()].into(), ..Rules::default() }
}

fn pod(mode: Option<&str>) -> PodView {
    PodView {
        uid: "u".into(),
        namespace: "shop".into(),
        name: "cart".into(),
        mode: mode.map(Into::into),
        ..PodView::default()
    }
}

fn namespace(mode: Option<&str>) -> NamespaceView {
    NamespaceView { name: "shop".into(), mode: mode.map(Into::into) }
}

fn plain() -> Decision {
    Decision::Enroll(PodSettings::default())
}

#[test]
fn labels_of_pod_and_namespace_decide() {
    use Reason::{NamespaceUnknown, NotLabelled, OptedOut};
    let table = [
        // pod, namespace, outcome
        (None, None, Decision::No(NotLabelled)),
        (None, Some("ambient"), plain()),
        (None, Some("none"), Decision::No(NotLabelled)),
        (None, Some("other"), Decision::No(NotLabelled)),
        (Some("ambient"), None, plain()),
        (Some("ambient"), Some("none"), plain()),
        (Some("ambient"), Some("ambient"), plain()),
        (Some("none"), None, Decision::No(OptedOut)),
        (Some("none"), Some("ambient"), Decision::No(OptedOut)),
        (Some("other"), None, Decision::No(NotLabelled)),
        (Some("other"), Some("ambient"), plain()),
        (Some(""), Some("ambient"), plain()),
    ];
    for (of_pod, of_namespace, outcome) in table {
        let decision = decide(&pod(of_pod), Some(&namespace(of_namespace)), &rules());
        assert_eq!(decision, outcome, "pod {of_pod:?}, namespace {of_namespace:?}");
    }
    assert_eq!(decide(&pod(None), None, &rules()), Decision::No(NamespaceUnknown));
    assert_eq!(decide(&pod(Some("ambient")), None, &rules()), plain());
    assert_eq!(decide(&pod(Some("none")), None, &rules()), Decision::No(OptedOut));
}

#[test]
fn what_no_label_can_enroll() {
    type Change = fn(&mut PodView);
    let table: [(Change, Reason); 4] = [
        (|pod| pod.host_network = true, Reason::HostNetwork),
        (|pod| pod.ended = true, Reason::Ended),
        (|pod| pod.sidecar = true, Reason::Sidecar),
        (|pod| pod.namespace = "kube-system".into(), Reason::Excluded),
    ];
    for (change, reason) in table {
        let mut pod = pod(Some("ambient"));
        change(&mut pod);
        // A pod that is not enrolled is not refused either.
        pod.bypass_inbound = Some("nonsense".into());
        for namespace in [Some(namespace(Some("ambient"))), None] {
            assert_eq!(decide(&pod, namespace.as_ref(), &rules()), Decision::No(reason));
        }
    }
}

#[test]
fn a_pod_that_terminates_stays() {
    let pod = PodView { terminating: true, ..pod(Some("ambient")) };
    assert_eq!(decide(&pod, None, &rules()), plain());
}

#[test]
fn another_label_can_be_chosen() {
    let rules = Rules { enable_label: "mesh=on".parse().unwrap(), ..rules() };
    assert_eq!(decide(&pod(Some("on")), None, &rules), plain());
    assert_eq!(
        decide(&pod(Some("none")), Some(&namespace(Some("on"))), &rules),
        Decision::No(Reason::OptedOut)
    );
    for bad in ["", "mesh", "mesh=", "=on", "mesh=none"] {
        assert!(bad.parse::<EnableLabel>().is_err(), "{bad:?}");
    }
    assert_eq!(EnableLabel::default().to_string().parse(), Ok(EnableLabel::default()));
}

#[test]
fn switches_are_all_understood_or_the_pod_is_refused() {
    for (value, on) in [("true", true), ("1", true), (" True ", true), ("false", false), ("0", false)] {
        let pod = PodView { bypass_inbound: Some(value.into()), ..pod(Some("ambient")) };
        let Decision::Enroll(settings) = decide(&pod, None, &rules()) else { panic!("{value:?} is refused") };
        assert_eq!(settings.bypass_inbound, on, "{value:?}");
    }
    for value in ["", "yes", "truee", "tr ue"] {
        let good_elsewhere = Some("tap0".to_owned());
        let pod = PodView {
            bypass_inbound: Some(value.into()),
            virtual_interfaces: good_elsewhere,
            ..pod(Some("ambient"))
        };
        let Decision::Refuse(bad) = decide(&pod, None, &rules()) else { panic!("{value:?} is taken") };
        assert!(bad.to_string().contains(BYPASS_INBOUND) && bad.to_string().contains("\"true\""), "{bad}");
    }
}

#[test]
fn a_pod_can_say_whether_its_sources_are_verified() {
    let decided = |value: Option<&str>| {
        let source_ip_verification = value.map(str::to_owned);
        decide(&PodView { source_ip_verification, ..pod(Some("ambient")) }, None, &rules())
    };
    for (value, any_source) in [(None, None), (Some("true"), Some(false)), (Some("false"), Some(true))] {
        let expected = PodSettings { any_source, ..PodSettings::default() };
        assert_eq!(decided(value), Decision::Enroll(expected), "{value:?}");
    }
    let Decision::Refuse(bad) = decided(Some("off")) else { panic!("it is taken") };
    assert_eq!((bad.annotation, bad.value.as_str()), (SOURCE_IP_VERIFICATION, "off"));
}

#[test]
fn a_pod_that_leaves_says_how_long_the_proxys_connections_may_go_on() {
    let rules = Rules { unenroll_grace: Duration::from_secs(7), ..rules() };
    let with = |mode, value: Option<&str>| PodView { unenroll_grace: value.map(str::to_owned), ..pod(mode) };
    for (value, seconds) in
        [(None, 7), (Some("0"), 0), (Some(" 30 "), 30), (Some("soon"), 7), (Some("-1"), 7)]
    {
        for (mode, reason) in [(Some("none"), Reason::OptedOut), (None, Reason::NotLabelled)] {
            let leaving = with(mode, value);
            assert_eq!(decide(&leaving, Some(&NamespaceView::default()), &rules), Decision::No(reason));
            assert_eq!(reason.grace(&leaving, &rules), Duration::from_secs(seconds), "{value:?}");
        }
        for reason in [Reason::Ended, Reason::Excluded, Reason::Sidecar] {
            assert_eq!(reason.grace(&with(None, value), &rules), Duration::ZERO);
        }
    }
    // An invalid value is refused while there is time to correct it.
    let Decision::Refuse(bad) = decide(&with(Some("ambient"), Some("soon")), None, &rules) else { panic!() };
    assert_eq!((bad.annotation, bad.value.as_str()), (UNENROLL_GRACE, "soon"));
}

#[test]
fn virtual_interfaces_are_a_list_of_names() {
    let table: [(&str, Option<&[&str]>); 12] = [
        ("", Some(&[])),
        ("  ", Some(&[])),
        ("tap0", Some(&["tap0"])),
        (" tap0 ,vnet1,tap0", Some(&["tap0", "vnet1"])),
        ("k6t-eth0.5@x", Some(&["k6t-eth0.5@x"])),
        ("tap0,", None),
        (",", None),
        ("tap 0", None),
        ("a/b", None),
        ("a:b", None),
        ("lo", None),
        ("sixteen-letters-", None),
    ];
    for (value, expected) in table {
        let pod = PodView { virtual_interfaces: Some(value.into()), ..pod(Some("ambient")) };
        match (decide(&pod, None, &rules()), expected) {
            (Decision::Enroll(settings), Some(expected)) => {
                assert_eq!(settings.virtual_interfaces, expected, "{value:?}");
            }
            (Decision::Refuse(bad), None) => assert_eq!(bad.value, value),
            (decision, _) => panic!("{value:?}: {decision:?}"),
        }
    }
}
