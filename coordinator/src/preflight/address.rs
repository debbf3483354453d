//! Which of a node's addresses Calico's autodetection takes. As its `node/pkg/lifecycle/startup/autodetection` does it.

use std::net::IpAddr;

use flannel_migration_protocol::{HostFacts, Interface};
use ipnet::IpNet;
use regex::Regex;

use crate::calico::family::Family;

/// The address of a family that `method` finds; none when that can't be known from here, or nothing is found. `internal`: the Node's
/// `InternalIP`.
#[must_use]
pub fn detected(method: &str, family: Family, host: &HostFacts, internal: Option<IpAddr>) -> Option<IpAddr> {
    let first = |takes: &dyn Fn(&Interface, &IpNet) -> bool| {
        // The last interface is looked at first.
        let all = host.interfaces.iter().rev();
        all.flat_map(|interface| interface.addresses.iter().map(move |net| (interface, net)))
            .filter(|(interface, net)| takes(interface, net))
            .map(|(_, net)| net.addr())
            .find(|address| Family::of(*address) == family && is_global(*address))
    };
    let (kind, words) = method.split_once('=').unwrap_or((method, ""));
    let words = words.split(',').map(str::trim);
    match kind {
        "" | "first-found" | "first" => first(&|_, _| true),
        "kubernetes-internal-ip" => internal,
        "interface" => {
            let names = patterns(words)?;
            first(&|interface, _| names.iter().any(|name| name.is_match(&interface.name)))
        }
        "skip-interface" => {
            let names = patterns(words)?;
            first(&|interface, _| !names.iter().any(|name| name.is_match(&interface.name)))
        }
        "cidr" => {
            let networks: Vec<IpNet> = words.map(str::parse).collect::<Result<_, _>>().ok()?;
            first(&|_, net| networks.iter().any(|network| network.contains(&net.addr())))
        }
        _ => None,
    }
}

/// As Go has it (`IsGlobalUnicast`): private ones count.
fn is_global(address: IpAddr) -> bool {
    let local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

fn patterns<'a>(words: impl Iterator<Item = &'a str>) -> Option<Vec<Regex>> {
    words.map(Regex::new).collect::<Result<_, _>>().ok()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("first-found", Some("192.168.9.1"))]
    #[case("kubernetes-internal-ip", Some("10.0.0.5"))]
    #[case("interface=eth0", Some("172.16.0.1"))]
    #[case("interface=ens.*, eth[0-9]", Some("172.16.0.1"))]
    #[case("skip-interface=storage", Some("172.16.0.1"))]
    #[case("cidr=172.16.0.0/12", Some("172.16.0.1"))]
    #[case("cidr=172.16", None)]
    #[case("interface=(", None)]
    #[case("interface=wlan.*", None)]
    #[case("can-reach=8.8.8.8", None)]
    fn the_address_is_the_one_that_calico_takes(#[case] method: &str, #[case] address: Option<&str>) {
        let interface = |name: &str, net: &str| Interface {
            name: name.into(),
            addresses: ["169.254.1.1/16", "fe80::1/64", net, "fd00:172::7/64"]
                .map(|text| text.parse().unwrap())
                .into(),
        };
        let host = HostFacts {
            interfaces: vec![interface("eth0", "172.16.0.1/24"), interface("storage0", "192.168.9.1/24")],
            ..HostFacts::default()
        };
        let internal = "10.0.0.5".parse().ok();
        let found = detected(method, Family::V4, &host, internal);
        assert_eq!(found, address.map(|text| text.parse().unwrap()));
    }

    #[test]
    fn each_family_has_an_address_of_its_own() {
        let addresses = ["172.16.0.1/24", "fe80::1/64", "fd00:172::7/64", "2001:db8::1/64"];
        let addresses = addresses.map(|text| text.parse().unwrap()).into();
        let host = HostFacts {
            interfaces: vec![Interface { name: "eth0".into(), addresses }],
            ..HostFacts::default()
        };
        for (method, address) in [
            ("first-found", "fd00:172::7"),
            ("cidr=2001:db8::/32", "2001:db8::1"),
            ("interface=eth0", "fd00:172::7"),
        ] {
            assert_eq!(detected(method, Family::V6, &host, None), Some(address.parse().unwrap()), "{method}");
        }
    }
}
