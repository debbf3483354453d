//! What kind of cluster a test bed is: one typed configuration for every shape.

use std::{fmt, str::FromStr};

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::parts::Versions;

/// The whole shape. `Shape::default()` is what flannel's stock manifest gives: three nodes, 10.244.0.0/16.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// The nodes that `up` starts.
    pub nodes: Vec<NodeShape>,
    /// The cluster's pod network, IPv4.
    pub pod_cidr: Cidr,
    /// Length of a node's share of it.
    pub node_prefix: u8,
    /// VXLAN network identifier; flannel's default is 1.
    pub vni: u32,
    /// VXLAN's UDP port; flannel's default, the kernel's own, is 8472.
    pub port: u16,
    /// Whose DaemonSet, under which names.
    pub layout: Layout,
    /// How flannel writes its packet filter rules.
    pub rules: Rules,
    /// IPv6 beside IPv4: `fd00:10:244::/56` with a /64 per node.
    pub dual_stack: bool,
    /// How Services are done.
    pub kube_proxy: KubeProxy,
    /// Of what the cluster is made.
    pub versions: Versions,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeShape {
    /// Host name and Node name.
    pub name: String,
    /// Carries the control-plane label and taint. (The control plane's programs run outside the nodes.)
    pub control_plane: bool,
    /// `net.ipv4.conf.all.rp_filter`: 0 off, 1 strict, 2 loose.
    pub rp_filter: u8,
}

/// An IPv4 network in CIDR notation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: std::net::Ipv4Addr,
    prefix: u8,
}

/// Which of flannel's layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Today's: `kube-flannel/kube-flannel-ds`.
    Current,
    /// Until v0.18: `kube-system/kube-flannel-ds-amd64`.
    Older,
    /// Canal: flannel's overlay with Calico's policies, `kube-system/canal`.
    Canal,
    /// No flannel: Calico from its own stock manifest for VXLAN, as on a cluster that never had anything else.
    Calico,
}

/// flannel's packet filter rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Rules {
    /// iptables on `nf_tables`, as most distributions have it.
    Iptables,
    /// iptables-legacy.
    Legacy,
    /// flannel's own nftables tables (`EnableNFTables`).
    Nftables,
}

/// kube-proxy's mode. From Calico 3.32 on, Felix follows it by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum KubeProxy {
    /// iptables, as installers set it up unless told otherwise.
    Iptables,
    /// nftables: stable since Kubernetes 1.33.
    Nftables,
}

impl KubeProxy {
    /// As kube-proxy's configuration says it.
    #[must_use]
    pub fn mode(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            nodes: NodeShape::numbered(3),
            pod_cidr: Cidr { address: std::net::Ipv4Addr::new(10, 244, 0, 0), prefix: 16 },
            node_prefix: 24,
            vni: 1,
            port: 8472,
            layout: Layout::Current,
            rules: Rules::Iptables,
            dual_stack: false,
            kube_proxy: KubeProxy::Iptables,
            versions: Versions::default(),
        }
    }
}

impl NodeShape {
    /// A worker with strict `rp_filter`.
    #[must_use]
    pub fn worker(name: &str) -> Self {
        Self { name: name.to_owned(), control_plane: false, rp_filter: 1 }
    }

    /// n1, n2, ... workers.
    #[must_use]
    pub fn numbered(count: usize) -> Vec<Self> {
        (1..=count).map(|number| Self::worker(&format!("n{number}"))).collect()
    }
}

impl Shape {
    /// Refuses what can't come up, and says which value and why.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.nodes.is_empty() && self.nodes.len() <= MOST_NODES, "nodes: 1 to {MOST_NODES}");
        for (position, node) in self.nodes.iter().enumerate() {
            check_name("node name", &node.name)?;
            ensure!(node.rp_filter <= 2, "rp_filter of {}: {} is none of 0, 1, 2", node.name, node.rp_filter);
            let twice = self.nodes.iter().skip(position + 1).any(|other| other.name == node.name);
            ensure!(!twice, "node name {:?} is there twice", node.name);
        }
        let (pods, node) = (self.pod_cidr.prefix, self.node_prefix);
        ensure!(
            node > pods && node <= 28,
            "node prefix /{node}: must be longer than the pod CIDR's /{pods}, /28 at most"
        );
        ensure!(
            node - pods <= 16,
            "node prefix /{node}: the controller manager allows 16 bits below the pod CIDR's /{pods}"
        );
        ensure!(self.vni < 1 << 24, "VNI {}: has 24 bits", self.vni);
        ensure!(self.port > 0, "port: must not be 0");
        ensure!(
            self.kube_proxy == KubeProxy::Iptables || self.versions.kubernetes_minor() >= 31,
            "kube-proxy nftables: Kubernetes {} has it behind a feature gate; v1.31 and later have it by themselves",
            self.versions.kubernetes
        );
        if self.layout == Layout::Canal {
            ensure!(self.rules == Rules::Iptables, "canal: its manifest runs flannel with iptables only");
            ensure!(!self.dual_stack, "canal: its manifest is IPv4 only");
        }
        if self.layout == Layout::Calico {
            ensure!(self.rules == Rules::Iptables, "calico: there is no flannel whose rules could differ");
            ensure!(!self.dual_stack, "calico: its manifest is IPv4 only");
        }
        Ok(())
    }
}

/// Addresses are given out by number: more nodes than this don't fit the test bed's own network.
pub const MOST_NODES: usize = 50;

/// Names end up in host names, namespaces and paths.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let valid = !name.is_empty()
        && name.len() <= 12
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && !name.ends_with('-');
    if !valid {
        bail!("{what} {name:?}: 1 to 12 of a-z, 0-9 and -, beginning with a letter, not ending with -");
    }
    Ok(())
}

impl FromStr for Cidr {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            Some((
                address.parse::<std::net::Ipv4Addr>().ok()?,
                prefix.parse::<u8>().ok().filter(|p| *p <= 32)?,
            ))
        });
        let Some((address, prefix)) = parsed else { bail!("{text:?} is no IPv4 network like 10.244.0.0/16") };
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        ensure!(address.to_bits() & !mask == 0, "{text:?} has bits set behind its prefix");
        Ok(Self { address, prefix })
    }
}

impl TryFrom<String> for Cidr {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_what_the_stock_manifest_gives() {
        let shape = Shape::default();
        shape.check().unwrap();
        assert_eq!(shape.pod_cidr.to_string(), "10.244.0.0/16");
    }

    #[test]
    fn a_shape_survives_being_written_down() {
        let shape = Shape { layout: Layout::Canal, vni: 4096, ..Shape::default() };
        let text = serde_json::to_string(&shape).unwrap();
        assert_eq!(serde_json::from_str::<Shape>(&text).unwrap(), shape);
    }

    #[test]
    fn what_cannot_come_up_is_named() {
        let wrong = |change: &dyn Fn(&mut Shape), word: &str| {
            let mut shape = Shape::default();
            change(&mut shape);
            let error = shape.check().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        wrong(&|s| s.nodes.clear(), "nodes");
        wrong(&|s| s.nodes[1].name = "n1".into(), "twice");
        wrong(&|s| s.nodes[0].name = "N1".into(), "\"N1\"");
        wrong(&|s| s.nodes[0].rp_filter = 3, "rp_filter of n1");
        wrong(&|s| s.node_prefix = 16, "/16");
        wrong(&|s| s.vni = 1 << 24, "VNI");
        wrong(&|s| (s.layout, s.dual_stack) = (Layout::Canal, true), "canal");
    }

    #[test]
    fn networks_are_parsed_strictly() {
        for text in ["10.244.0.0", "10.244.0.0/33", "10.244.0.1/16", "fd00::/8", ""] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
        assert!("0.0.0.0/0".parse::<Cidr>().is_ok());
    }
}
