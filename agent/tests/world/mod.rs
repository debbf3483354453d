//! A node with flannel as it really is, in throw-away network namespaces: device, routes, neighbours, forwarding entries, bridge,
//! pods, rules, CNI files; a peer beside it; and probers.

#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

pub mod connection;
pub mod crashes;
pub mod probers;
pub mod six;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use flannel_migration_agent::host::netns;
use flannel_migration_agent::inventory::Known;
use flannel_migration_agent::journal::Journal;
use flannel_migration_agent::steps::{Op, Site, apply, capture};
use flannel_migration_protocol::Grant;

static NUMBER: AtomicU32 = AtomicU32::new(0);
// One world at a time: two at once would measure each other's load.
static TURN: Mutex<()> = Mutex::new(());

pub struct World {
    pub name: String,
    pub pods: Vec<Pod>,
    /// Whether it has IPv6 too.
    pub dual: bool,
    pub directory: tempfile::TempDir,
    namespaces: Vec<String>,
    turn: MutexGuard<'static, ()>,
}

#[derive(Clone)]
pub struct Pod {
    pub netns: String,
    pub name: String,
    pub address: Ipv4Addr,
    pub six: Option<Ipv6Addr>,
    pub sandbox: String,
}

impl Pod {
    pub fn addresses(&self) -> Vec<IpAddr> {
        [self.address.into()].into_iter().chain(self.six.map(IpAddr::V6)).collect()
    }
}

pub fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-euc", script]).output().expect("sh");
    assert!(
        output.status.success(),
        "{script}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn require(program: &str, package: &str) {
    let found =
        Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap().status.success();
    assert!(found, "{program} is needed by this test: install the package {package}");
}

const IPTABLES: &str = r#"*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE
COMMIT
"#;

impl World {
    /// A node with so many pods, and a peer.
    pub fn new(pods: u8) -> Self {
        Self::of(pods, false)
    }

    /// The same with IPv6 beside IPv4.
    pub fn dual(pods: u8) -> Self {
        Self::of(pods, true)
    }

    fn of(pods: u8, dual: bool) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
        for (program, package) in
            [("ip", "iproute2"), ("bridge", "iproute2"), ("iptables-nft", "iptables"), ("nft", "nftables")]
        {
            require(program, package);
        }
        let name = format!("fm{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut world = Self {
            name: name.clone(),
            pods: Vec::new(),
            dual,
            directory: tempfile::tempdir().unwrap(),
            namespaces: Vec::new(),
            turn: TURN.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let node = world.namespace("node");
        let peer = world.namespace("peer");
        let disabled = if dual {
            "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding"
        } else {
            "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 || true"
        };
        for ns in [&node, &peer] {
            sh(&format!(
                "ip netns exec {ns} sh -euc 'for k in all default; do echo 1 >/proc/sys/net/ipv4/conf/$k/rp_filter; done; \
                 echo 1 >/proc/sys/net/ipv4/ip_forward; {disabled}; ip link set lo up; \
                 echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables || true' 2>/dev/null"
            ));
        }
        sh(&format!(
            "ip -n {node} link add eth0 type veth peer name eth0 netns {peer}
             ip -n {node} addr add 192.0.2.1/24 dev eth0; ip -n {peer} addr add 192.0.2.2/24 dev eth0
             ip -n {node} link set eth0 up; ip -n {peer} link set eth0 up
             ip -n {node} route add default via 192.0.2.2
             ip -n {peer} addr add 10.244.2.5/32 dev lo; ip -n {peer} addr add 10.96.0.1/32 dev lo"
        ));
        for (ns, own, other) in [(&node, 1, 2), (&peer, 2, 1)] {
            sh(&format!(
                "ip -n {ns} link add flannel.1 address 0a:00:00:00:00:0{own} mtu 1450 type vxlan id 1 dstport 8472 local 192.0.2.{own} dev eth0 nolearning
                 ip -n {ns} addr add 10.244.{own}.0/32 dev flannel.1
                 ip -n {ns} link set flannel.1 up
                 ip -n {ns} neigh add 10.244.{other}.0 lladdr 0a:00:00:00:00:0{other} dev flannel.1 nud permanent
                 bridge -n {ns} fdb add 0a:00:00:00:00:0{other} dst 192.0.2.{other} dev flannel.1 self permanent
                 ip -n {ns} route add 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink"
            ));
        }
        sh(&format!(
            "ip -n {node} link add cni0 mtu 1450 type bridge; ip -n {node} addr add 10.244.1.1/24 dev cni0; ip -n {node} link set cni0 up"
        ));
        if dual {
            six::plumb(&node, &peer);
        }
        world.script("iptables-nft-restore --noflush", IPTABLES);
        world.script("nft -f -", "table ip flannel-ipv4 {\n chain forward {\n type filter hook forward priority 0;\n ip saddr 10.244.0.0/16 accept\n }\n }\n");
        world.script("iptables-legacy-restore --noflush", IPTABLES);
        std::fs::create_dir_all(world.path("net.d")).unwrap();
        std::fs::write(
            world.path("net.d/10-flannel.conflist"),
            r#"{"name":"cbr0","cniVersion":"0.3.1","plugins":[{"type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}},{"type":"portmap","capabilities":{"portMappings":true}}]}"#,
        )
        .unwrap();
        for directory in ["results", "cni/networks/cbr0", "cni/flannel", "run"] {
            std::fs::create_dir_all(world.path(directory)).unwrap();
        }
        std::fs::write(world.path("run/subnet.env"), "FLANNEL_NETWORK=10.244.0.0/16\n").unwrap();
        for number in 0..pods {
            world.add_pod(number);
        }
        if dual {
            // The links' duplicate address checks pass before anything is compared.
            six::settle(&world);
        }
        world
    }

    pub fn namespace(&mut self, part: &str) -> String {
        let name = format!("{}-{part}", self.name);
        sh(&format!("ip netns add {name}"));
        self.namespaces.push(name.clone());
        name
    }

    pub fn node(&self) -> String {
        format!("{}-node", self.name)
    }

    pub fn peer(&self) -> String {
        format!("{}-peer", self.name)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn script(&self, program: &str, input: &str) {
        let file = self.path("input");
        std::fs::write(&file, input).unwrap();
        sh(&format!("ip netns exec {} {program} <{}", self.node(), file.display()));
    }

    fn add_pod(&mut self, number: u8) {
        let netns = self.namespace(&format!("p{number}"));
        // The bridge has its first port's for good.
        let mac = if self.dual && number == 0 { format!("address {}", six::MAC) } else { String::new() };
        let (node, veth, last) = (self.node(), format!("veth0000{number:04}"), u32::from(number) + 2);
        sh(&format!(
            "ip -n {netns} link add eth0 mtu 1450 type veth peer name {veth} {mac} netns {node}
             ip -n {node} link set {veth} mtu 1450 up; ip -n {node} link set {veth} master cni0; bridge -n {node} link set dev {veth} hairpin on
             ip -n {netns} link set lo up; ip -n {netns} link set eth0 up
             ip -n {netns} addr add 10.244.1.{last}/24 dev eth0
             ip -n {netns} route add 10.244.0.0/16 via 10.244.1.1; ip -n {netns} route add default via 10.244.1.1"
        ));
        let pod = Pod {
            netns: netns.clone(),
            name: format!("pod-{number}"),
            address: Ipv4Addr::new(10, 244, 1, u8::try_from(last).unwrap()),
            six: self.dual.then(|| six::pod(&netns, &veth, &node, last)),
            sandbox: format!("{number:064x}"),
        };
        let mut ips = vec![
            serde_json::json!({"version": "4", "interface": 2, "address": format!("{}/24", pod.address), "gateway": "10.244.1.1"}),
        ];
        ips.extend(pod.six.map(|six| {
            serde_json::json!({"version": "6", "interface": 2, "address": format!("{six}/64"), "gateway": six::GATEWAY})
        }));
        let record = serde_json::json!({
            "kind": "cniCacheV1", "containerId": pod.sandbox, "ifName": "eth0", "networkName": "cbr0",
            "cniArgs": [["K8S_POD_NAMESPACE", "default"], ["K8S_POD_NAME", pod.name], ["K8S_POD_UID", format!("uid-{number}")]],
            "result": {"cniVersion": "0.3.1",
                "interfaces": [{"name": "cni0"}, {"name": veth}, {"name": "eth0", "sandbox": format!("/var/run/netns/{netns}")}],
                "ips": ips},
        });
        std::fs::write(self.path(&format!("results/cbr0-{}-eth0", pod.sandbox)), record.to_string()).unwrap();
        self.pods.push(pod);
    }

    pub fn grant(&self) -> Grant {
        let networks: &[&str] = if self.dual { &["10.244.0.0/16", six::NETWORK] } else { &["10.244.0.0/16"] };
        serde_json::from_value(serde_json::json!({
            "epoch": 1, "fence": 1, "goal": "migrate", "strategy": "in-place", "budgetSeconds": 120,
            "flannel": {"networks": networks, "vni": 1, "port": 8472, "mtu": 1450, "cniConfDir": self.path("net.d")},
            "calico": {"cniConfName": "10-calico.conflist",
                       "cniConfTemplate": r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","mtu":__CNI_MTU__,"nodename":"__KUBERNETES_NODE_NAME__"}]}"#,
                       "mtu": 1450, "healthPort": 9099, "kubeServiceAddress": "10.96.0.1:443"},
        }))
        .unwrap()
    }

    pub fn site(&self, rename_live: bool) -> Site {
        Site {
            node: "n1".into(),
            results: self.path("results"),
            cni_state: self.path("cni"),
            flannel_run: self.path("run"),
            rename_live,
        }
    }

    pub fn known(&self) -> Vec<Known> {
        let known = |(number, pod): (usize, &Pod)| Known {
            namespace: "default".into(),
            name: pod.name.clone(),
            uid: format!("uid-{number}"),
            addresses: pod.addresses(),
            finished: false,
        };
        self.pods.iter().enumerate().map(known).collect()
    }

    /// A journal with everything captured.
    pub fn captured(&self, rename_live: bool) -> Journal {
        let mut journal = Journal::open(&self.path("journal"), "n1").unwrap();
        let grant = self.grant();
        journal.entry.grant = Some(grant.clone());
        let (captured, inventory) = self.inside(|| {
            capture::capture(&journal, &grant, &self.site(rename_live), Some(&self.known())).unwrap()
        });
        assert_eq!(inventory.adopt.len(), self.pods.len(), "{inventory:?}");
        assert!(inventory.evict.is_empty() && inventory.strangers.is_empty() && inventory.ignored.is_empty());
        journal.entry.captured = Some(captured);
        journal.write().unwrap();
        journal
    }

    /// Works in the node's namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run(&Path::new("/run/netns").join(self.node()), work).unwrap()
    }

    /// Does all operations of the switch, and says how long each took.
    pub fn switch(&self, journal: &mut Journal, site: &Site) {
        let started = Instant::now();
        self.inside(|| {
            for op in Op::SWITCH {
                let started = Instant::now();
                apply(journal, site, op).unwrap();
                println!(
                    "{:16} {:?}, ended at {:?}",
                    op.as_str(),
                    started.elapsed(),
                    probers::START.elapsed()
                );
            }
        });
        println!("switch of {} pods: {:?}", self.pods.len(), started.elapsed());
    }

    /// Everything is as it was.
    pub fn assert_same(&self, before: &BTreeMap<String, String>, what: &str) {
        if self.dual {
            six::settle(self);
        }
        let after = self.snapshot();
        for (part, text) in before {
            assert_eq!(text, &after[part], "{what}: {part}");
        }
    }

    /// Everything that must be the same again after an undo.
    pub fn snapshot(&self) -> BTreeMap<String, String> {
        let node = self.node();
        let mut parts = BTreeMap::new();
        let mut put = |name: &str, script: String| {
            let mut lines: Vec<String> = sh(&script).lines().map(str::to_owned).collect();
            if name == "link" || name == "fdb" || name == "neighbour" {
                lines.sort();
            }
            parts.insert(name.to_owned(), lines.join("\n"));
        };
        put("link", format!("ip -n {node} -o link | sed 's/qlen [0-9]*//'"));
        put("device", format!("ip -n {node} -j -d link show flannel.1"));
        // Newer tools also print a count that goes on by itself.
        put("ports", format!("bridge -n {node} -d link show | sed 's/ mcast_n_groups [0-9]*//'"));
        put("address", format!("ip -n {node} -j -4 address | sed 's/\"operstate\":\"[A-Z]*\",//g'"));
        put("route", format!("ip -n {node} -j route"));
        put("neighbour", format!("ip -n {node} neigh show nud permanent"));
        put("fdb", format!("bridge -n {node} fdb show dev flannel.1"));
        put(
            "rules",
            format!(
                "ip netns exec {node} sh -c 'iptables-nft-save; iptables-legacy-save; nft list table ip flannel-ipv4' | grep -v '^#' | sed 's/ \\[.*//'"
            ),
        );
        put(
            "settings",
            format!(
                "ip netns exec {node} sh -c 'cd /proc/sys/net/ipv4; grep . conf/*/rp_filter conf/*/proxy_arp conf/*/forwarding conf/*/route_localnet neigh/*/proxy_delay'"
            ),
        );
        put(
            "files",
            format!(
                "cd {}; find net.d results cni run -type f -exec cksum {{}} + | sort",
                self.directory.path().display()
            ),
        );
        if self.dual {
            for (name, script) in six::snapshot(&node, &self.pods) {
                put(&name, script);
            }
        }
        for pod in &self.pods {
            put(
                &format!("pod {}", pod.name),
                format!(
                    "ip -n {0} -j route; ip -n {0} -j -4 address; ip -n {0} neigh show | grep 169.254 || true",
                    pod.netns
                ),
            );
        }
        parts
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            drop(Command::new("ip").args(["netns", "del", namespace]).output());
        }
    }
}
