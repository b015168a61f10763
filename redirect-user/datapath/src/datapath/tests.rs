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
    assert_eq!(unenroll(&mut fake, &target).len(), 1);
    assert_eq!(fake.facts(COOKIE).len(), 1);
    assert!(unenroll(&mut fake, &target).is_empty());
    assert!(fake.facts(COOKIE).is_empty());
}

#[test]
fn a_pod_is_released_in_one_step_that_leaves_everything_in_place() {
    for (kind, adoption) in
        KINDS.into_iter().flat_map(|kind| [(kind, Adoption::None), (kind, Adoption::Recent)])
    {
        let target = target(kind).adopted(adoption);
        let mut fake = fake();
        enroll(&mut fake, &target).unwrap();
        let is_pod = |fact: &Fact| matches!(fact, Fact::Pod(_));
        let others = |fake: &Fake| -> Vec<Fact> {
            fake.facts(COOKIE).into_iter().filter(|fact| !is_pod(fact)).collect()
        };
        let before = others(&fake);
        let asked = |fake: &Fake| {
            let state = fake.state();
            (state.applied.len(), state.observed)
        };
        let (applied, observed) = asked(&fake);
        release(&mut fake, &target).unwrap();
        assert_eq!(asked(&fake), (applied + 1, observed));
        assert_eq!(others(&fake), before);
        let released = |fact: &Fact| match fact {
            Fact::Pod(Pod { flags, .. }) => {
                let flags = PodFlags(*flags);
                flags.contains(PodFlags::RELEASED) && !flags.contains(PodFlags::HALF_OPEN)
            }
            _ => false,
        };
        assert!(fake.facts(COOKIE).iter().any(released));
        assert!(unenroll(&mut fake, &target).is_empty() && fake.facts(COOKIE).is_empty());
    }
}

#[test]
fn a_pod_that_waits_to_be_captured_is_not_released() {
    let target = target(KINDS[0]).adopted(Adoption::Awaited);
    let mut fake = fake();
    release(&mut fake, &target).unwrap();
    assert!(fake.facts(COOKIE).is_empty());
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
