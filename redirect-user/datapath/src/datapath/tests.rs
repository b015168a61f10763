use super::fake::Fake;
use super::*;

const COOKIE: u64 = 1;

fn fake() -> Fake {
    let fake = Fake::default();
    fake.insert(COOKIE, &[]);
    fake
}

fn target(addresses: &[&str]) -> Target {
    Target {
        identity: PodIdentity {
            name: "echo".into(),
            namespace: "dual-stack".into(),
            ..PodIdentity::default()
        },
        netns: NetNs::current().unwrap(),
        netns_cookie: COOKIE,
        addresses: addresses.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect(),
        flags: PodFlags::default(),
        virtual_interfaces: Vec::new(),
        exclusions: BTreeSet::new(),
        foreign: BTreeSet::new(),
        adoption: Adoption::None,
    }
}

const KINDS: [&[&str]; 3] = [&["10.0.0.2", "fd00::2"], &["10.0.0.2"], &["fd00::2"]];

#[test]
fn a_failure_at_any_step_leaves_nothing_behind() {
    for kind in KINDS {
        let target = target(kind);
        let mut whole = fake();
        enroll(&mut whole, &target).unwrap();
        let steps = whole.state().applied.len();
        for step in 0..steps {
            let mut fake = fake();
            fake.state().fail_at = Some(step);
            let error = enroll(&mut fake, &target).unwrap_err().to_string();
            assert!(error.contains("dual-stack/echo") && error.contains("no room"), "{error}");
            assert!(fake.facts(COOKIE).is_empty(), "after a failure at step {step}");
        }
    }
}

#[test]
fn enrolling_again_repairs_only_what_is_missing() {
    for kind in KINDS {
        let target = target(kind);
        let mut fake = fake();
        enroll(&mut fake, &target).unwrap();
        for lost in fake.facts(COOKIE) {
            fake.state().namespaces.get_mut(&COOKIE).unwrap().facts.remove(&lost);
            assert_eq!(missing(&mut fake, &target).unwrap(), std::slice::from_ref(&lost));
            fake.state().applied.clear();
            enroll(&mut fake, &target).unwrap();
            assert_eq!(fake.state().applied, [Op::Ensure(lost)]);
        }
    }
}

#[test]
fn un_enrolling_goes_on_after_an_error() {
    let target = target(KINDS[0]);
    let mut fake = fake();
    enroll(&mut fake, &target).unwrap();
    let next = fake.state().applied.len();
    fake.state().fail_at = Some(next + 3);
    let removed = unenroll(&mut fake, &target, Removal::Everything, None);
    assert_eq!(removed.errors.len(), 1);
    assert_eq!(fake.facts(COOKIE).len(), 1);
    assert!(unenroll(&mut fake, &target, Removal::Everything, None).errors.is_empty());
    assert!(fake.facts(COOKIE).is_empty());
}

#[test]
fn un_enrolling_in_two_steps_keeps_the_proxys_connections_in_between() {
    for kind in KINDS {
        let target = target(kind);
        let mut fake = fake();
        enroll(&mut fake, &target).unwrap();
        let removed = unenroll(&mut fake, &target, Removal::Capture, None);
        assert!(removed.errors.is_empty());
        assert_eq!(fake.facts(COOKIE), removed.left);
        assert!(fake.facts(COOKIE).iter().any(|fact| matches!(fact, Fact::Rule { .. })));
        assert!(
            !fake
                .facts(COOKIE)
                .iter()
                .any(|fact| matches!(fact, Fact::Program { .. } | Fact::Entry { .. } | Fact::Pod(_)))
        );
        let observed = fake.state().observed;
        assert!(unenroll(&mut fake, &target, Removal::Everything, Some(removed.left)).errors.is_empty());
        assert!(fake.facts(COOKIE).is_empty());
        assert_eq!(fake.state().observed, observed, "the kernel was asked again");
    }
}

#[test]
fn an_ipv6_address_without_ipv6_is_refused() {
    let target = target(KINDS[0]);
    let mut fake = fake();
    fake.state().namespaces.get_mut(&COOKIE).unwrap().namespace.ipv6 = false;
    let error = enroll(&mut fake, &target).unwrap_err().to_string();
    assert!(
        error.contains("dual-stack/echo") && error.contains("IPv6") && error.contains("disable_ipv6=0"),
        "{error}"
    );
    assert!(fake.state().applied.is_empty());
}
