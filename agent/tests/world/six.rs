//! What a node of flannel's has more of with IPv6 beside IPv4.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use super::{Pod, World, sh};

pub const NETWORK: &str = "fd00:10:244::/56";
pub const GATEWAY: &str = "fd00:10:244:1::1";
/// The bridge's hardware address.
pub const MAC: &str = "0a:58:0a:f4:01:01";
/// A pod of the peer's in its first block, and one of a block that nobody can know beforehand.
pub const REMOTE: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, 5),
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 7, 0x777),
];
pub const OUTSIDE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);

/// The links between the nodes, flannel's device, and the bridge's address.
pub fn plumb(node: &str, peer: &str) {
    for address in REMOTE {
        sh(&format!("ip -n {peer} addr add {address}/128 dev lo"));
    }
    for (ns, own, other) in [(node, 1, 2), (peer, 2, 1)] {
        sh(&format!(
            "ip -n {ns} addr add 2001:db8::{own}/64 dev eth0 nodad
             ip -n {ns} link add flannel-v6.1 address 0a:00:00:00:06:0{own} mtu 1430 type vxlan id 1 dstport 8472 local 2001:db8::{own} dev eth0 nolearning
             ip -n {ns} addr add fd00:10:244:{own}::/128 dev flannel-v6.1
             ip -n {ns} link set flannel-v6.1 up
             ip -n {ns} neigh add fd00:10:244:{other}:: lladdr 0a:00:00:00:06:0{other} dev flannel-v6.1 nud permanent
             bridge -n {ns} fdb add 0a:00:00:00:06:0{other} dst 2001:db8::{other} dev flannel-v6.1 self permanent
             ip -n {ns} route add fd00:10:244:{other}::/64 via fd00:10:244:{other}:: dev flannel-v6.1 onlink"
        ));
    }
    sh(&format!(
        "ip -n {node} -6 route add default via 2001:db8::2
         echo 0 | ip netns exec {node} tee /proc/sys/net/ipv6/conf/cni0/accept_ra >/dev/null
         ip -n {peer} link add cni0 type bridge; ip -n {peer} link set cni0 up; ip -n {peer} addr add fd00:10:244:2::1/64 dev cni0 nodad
         ip -n {node} link set cni0 down; ip -n {node} link set cni0 address {MAC}; ip -n {node} link set cni0 up
         ip -n {node} addr add {GATEWAY}/64 dev cni0"
    ));
}

/// As the bridge plugin does it.
pub fn pod(netns: &str, veth: &str, node: &str, last: u32) -> Ipv6Addr {
    let address = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, u16::try_from(last).unwrap());
    sh(&format!(
        "echo 0 | ip netns exec {netns} tee /proc/sys/net/ipv6/conf/eth0/accept_dad >/dev/null
         echo 0 | ip netns exec {node} tee /proc/sys/net/ipv6/conf/{veth}/accept_ra >/dev/null
         ip -n {netns} addr add {address}/64 dev eth0 nodad
         ip -n {netns} -6 route add {NETWORK} via {GATEWAY}; ip -n {netns} -6 route add default via {GATEWAY}"
    ));
    address
}

pub fn settle(world: &World) {
    let spaces: Vec<String> = [world.node(), world.peer()]
        .into_iter()
        .chain(world.pods.iter().map(|pod| pod.netns.clone()))
        .collect();
    let started = Instant::now();
    while spaces.iter().any(|ns| !sh(&format!("ip -n {ns} -6 address show tentative")).is_empty()) {
        assert!(started.elapsed() < Duration::from_secs(15), "addresses stay tentative");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// New addresses are the node's at once, so that a test of something else needn't wait for them.
pub fn ask_nobody(world: &World) {
    let node = world.node();
    sh(&format!(
        "ip netns exec {node} sh -euc 'for file in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 >$file; done'"
    ));
}

/// What must be the same again after an undo.
pub fn snapshot(node: &str, pods: &[Pod]) -> Vec<(String, String)> {
    let mut parts = vec![
        ("device of IPv6".to_owned(), format!("ip -n {node} -j -d link show flannel-v6.1")),
        (
            "addresses of IPv6".to_owned(),
            // The kernel doesn't ask around for what it is given back, nor claim, as newer tools print, to have made it.
            format!(
                "ip -n {node} -6 -o address | sed '/flannel-v6.1 .*fe80/{{s/ nodad//;s/ proto kernel_ll//}}' | sort"
            ),
        ),
        ("routes of IPv6".to_owned(), format!("ip -n {node} -6 route | sort")),
        (
            "tables of IPv6".to_owned(),
            format!("ip -n {node} -6 rule; ip -n {node} -6 route show table 1718381927 || true"),
        ),
        ("forwarding of IPv6".to_owned(), format!("bridge -n {node} fdb show dev flannel-v6.1 | sort")),
        (
            "neighbours of IPv6".to_owned(),
            format!("ip -n {node} -6 neigh show nud permanent | sort; ip -n {node} -6 neigh show proxy"),
        ),
        (
            "settings of IPv6".to_owned(),
            format!(
                "ip netns exec {node} sh -c 'cd /proc/sys/net/ipv6; grep . conf/*/proxy_ndp conf/*/forwarding conf/*/accept_ra neigh/*/proxy_delay'"
            ),
        ),
    ];
    for pod in pods {
        parts.push((
            format!("pod {} of IPv6", pod.name),
            format!(
                "ip -n {0} -6 route | sort; ip -n {0} -6 -o address; ip -n {0} -6 neigh show nud permanent
                 ip netns exec {0} cat /proc/sys/net/ipv6/conf/eth0/accept_redirects",
                pod.netns
            ),
        ));
    }
    parts
}

/// A pod that Calico's plugin makes on the node; its namespace, host interface and addresses.
pub fn calicos_pod(world: &mut World) -> (String, String, [IpAddr; 2]) {
    let netns = world.namespace("guest");
    let (node, cali) = (world.node(), "cali00000000001".to_owned());
    let (four, six): (IpAddr, IpAddr) = ([10, 244, 1, 200].into(), "fd00:10:244:1::c8".parse().unwrap());
    sh(&format!(
        "ip -n {netns} link add eth0 mtu 1450 type veth peer name {cali} address ee:ee:ee:ee:ee:ee netns {node}
         echo 0 | ip netns exec {netns} tee /proc/sys/net/ipv6/conf/eth0/accept_dad >/dev/null
         echo 0 | ip netns exec {node} tee /proc/sys/net/ipv6/conf/{cali}/accept_dad >/dev/null
         echo 1 | ip netns exec {node} tee /proc/sys/net/ipv4/conf/{cali}/proxy_arp >/dev/null
         echo 0 | ip netns exec {node} tee /proc/sys/net/ipv4/neigh/{cali}/proxy_delay >/dev/null
         ip -n {node} link set {cali} up; ip -n {netns} link set eth0 up
         ip -n {netns} addr add {four}/32 dev eth0; ip -n {netns} addr add {six}/128 dev eth0 nodad
         ip -n {netns} route add 169.254.1.1 dev eth0; ip -n {netns} route add default via 169.254.1.1
         ip -n {netns} -6 route add default via fe80::ecee:eeff:feee:eeee dev eth0
         ip -n {node} route add {four} dev {cali}; ip -n {node} route add {six} dev {cali}"
    ));
    let record = serde_json::json!({
        "kind": "cniCacheV1", "containerId": "guest", "ifName": "eth0", "networkName": "k8s-pod-network",
        "cniArgs": [["K8S_POD_NAMESPACE", "default"], ["K8S_POD_NAME", "guest"], ["K8S_POD_UID", "uid-guest"]],
        "result": {"cniVersion": "0.3.1", "interfaces": [{"name": cali, "sandbox": format!("/var/run/netns/{netns}")}],
            "ips": [{"version": "4", "address": format!("{four}/32")}, {"version": "6", "address": format!("{six}/128")}]},
    });
    std::fs::write(world.path("results/k8s-pod-network-guest-eth0"), record.to_string()).unwrap();
    (netns, cali, [four, six])
}
