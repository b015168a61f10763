//! The result of the previous plugins: read for its addresses, printed unchanged.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::config::wrong;
use super::error::Error;
use super::version::SpecVersion;
use redirect_protocol::pod::PodAddresses;

/// The pod's own addresses in a CNI result: those of interfaces inside its sandbox, and those that name no interface.
pub fn addresses(result: &Value) -> Result<PodAddresses, Error> {
    let interfaces = list(result, "interfaces")?;
    let mut addresses = PodAddresses::default();
    for (i, ip) in list(result, "ips")?.iter().enumerate() {
        if is_inside(ip, interfaces, i)? {
            addresses.extend([address(ip, i)?]);
        }
    }
    if addresses.is_empty() { Err(Error::NoAddresses) } else { Ok(addresses) }
}

/// The result to print. Only a version that differs from the configuration's changes.
pub(super) fn pass_through(mut result: Value, version: SpecVersion) -> Value {
    result["cniVersion"] = version.as_str().into();
    result
}

fn list<'a>(result: &'a Value, key: &str) -> Result<&'a [Value], Error> {
    match result.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(wrong(format!("prevResult.{key}"), "must be a list")),
    }
}

/// Whether an address is inside the pod. An interface without a sandbox is the host's end. An invalid index is an error, because
/// skipping the address would leave one of the pod's families uncaptured.
fn is_inside(ip: &Value, interfaces: &[Value], i: usize) -> Result<bool, Error> {
    let index = match ip.get("interface") {
        None | Some(Value::Null) => return Ok(true),
        Some(index) => index,
    };
    let interface = index.as_u64().and_then(|index| interfaces.get(usize::try_from(index).ok()?));
    let Some(interface) = interface else {
        let problem = format!("is {index}, but there are {} interfaces", interfaces.len());
        return Err(wrong(format!("prevResult.ips[{i}].interface"), problem));
    };
    Ok(interface.get("sandbox").and_then(Value::as_str).is_some_and(|sandbox| !sandbox.is_empty()))
}

/// `address`, in CIDR notation or as a bare address.
fn address(ip: &Value, i: usize) -> Result<IpAddr, Error> {
    let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
    let parsed = text.parse::<IpNet>().map(|net| net.addr()).or_else(|_| text.parse::<IpAddr>());
    parsed
        .map_err(|_| wrong(format!("prevResult.ips[{i}].address"), "is neither an IPv4 nor an IPv6 address"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn texts(result: &Value) -> Vec<String> {
        addresses(result).unwrap().iter().map(|address| address.to_string()).collect()
    }

    #[test]
    fn addresses_outside_the_pod_are_left_out() {
        let result = json!({
            "interfaces": [
                { "name": "veth1" },
                { "name": "veth2", "sandbox": "" },
                { "name": "eth0", "sandbox": "/run/netns/a" },
            ],
            "ips": [
                { "address": "10.0.0.1/24", "interface": 0 },
                { "address": "10.0.0.2/24", "interface": 1 },
                { "address": "10.0.0.3/24", "interface": 2 },
                { "address": "fd00::4/64" },
                { "address": "fd00::5/64", "interface": null },
            ],
        });
        assert_eq!(texts(&result), ["10.0.0.3", "fd00::4", "fd00::5"]);
    }

    #[test]
    fn a_bare_address_will_do() {
        assert_eq!(texts(&json!({ "ips": [{ "address": "10.0.0.3" }] })), ["10.0.0.3"]);
    }

    #[test]
    fn nonsense_is_named() {
        for (result, key) in [
            (json!({ "ips": {} }), "prevResult.ips"),
            (json!({ "ips": [], "interfaces": 1 }), "prevResult.interfaces"),
            (json!({ "ips": [{}] }), "prevResult.ips[0].address"),
            (json!({ "ips": [{ "address": "ten" }] }), "prevResult.ips[0].address"),
            (json!({ "ips": [{ "address": "10.0.0.3/24", "interface": 0 }] }), "prevResult.ips[0].interface"),
            (
                json!({ "ips": [{ "address": "10.0.0.3/24", "interface": -1 }] }),
                "prevResult.ips[0].interface",
            ),
        ] {
            let error = addresses(&result).unwrap_err();
            assert_eq!(error.code(), 7);
            assert!(error.to_string().contains(key), "{error}");
        }
        for result in [json!({}), json!({ "ips": [] }), json!({ "ips": null })] {
            assert!(matches!(addresses(&result), Err(Error::NoAddresses)), "{result}");
        }
    }

    proptest! {
        #[test]
        fn any_address_in_cidr_notation_is_found(address: IpAddr, length in 0u8..=32) {
            let result = json!({ "ips": [{ "version": "9", "address": format!("{address}/{length}") }] });
            prop_assert_eq!(texts(&result), [address.to_canonical().to_string()]);
        }
    }
}
