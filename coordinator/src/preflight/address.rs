//! Which of a node's addresses Calico's autodetection takes. As its `node/pkg/lifecycle/startup/autodetection` does it.

use std::net::{IpAddr, Ipv4Addr};

use flannel_migration_protocol::{HostFacts, Interface};
use ipnet::IpNet;
use regex::Regex;

/// The address that `method` finds; none when that can't be known from here, or nothing is found. `internal`: the Node's `InternalIP`.
#[must_use]
pub fn detected(method: &str, host: &HostFacts, internal: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
    let first = |takes: &dyn Fn(&Interface, &IpNet) -> bool| {
        // The last interface is looked at first.
        let all = host.interfaces.iter().rev();
        all.flat_map(|interface| interface.addresses.iter().map(move |net| (interface, net)))
            .filter(|(interface, net)| takes(interface, net))
            .find_map(|(_, net)| match net.addr() {
                IpAddr::V4(address) if !address.is_loopback() && !address.is_link_local() => Some(address),
                _ => None,
            })
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
            addresses: vec!["169.254.1.1/16".parse().unwrap(), net.parse().unwrap()],
        };
        let host = HostFacts {
            interfaces: vec![interface("eth0", "172.16.0.1/24"), interface("storage0", "192.168.9.1/24")],
            ..HostFacts::default()
        };
        let internal = "10.0.0.5".parse().ok();
        assert_eq!(detected(method, &host, internal), address.map(|text| text.parse().unwrap()));
    }
}
