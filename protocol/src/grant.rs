//! What the coordinator hands out.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::state::Unknown;

/// Number of a lease on one node; grows with each lease on that node, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(NonZeroU64);

impl Epoch {
    /// The first lease of a node.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// `None` for 0.
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        match NonZeroU64::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The next lease's.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Text that is not an epoch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an epoch (a decimal number from 1, without sign or leading zero)")]
pub struct BadEpoch(pub String);

impl FromStr for Epoch {
    type Err = BadEpoch;

    fn from_str(text: &str) -> Result<Self, BadEpoch> {
        // Only the canonical form: two texts for one epoch would be two leases for one.
        match text.parse::<NonZeroU64>() {
            Ok(number) if number.to_string() == text => Ok(Self(number)),
            _ => Err(BadEpoch(text.to_owned())),
        }
    }
}

/// Where the node is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// From flannel to Calico.
    Migrate,
    /// From Calico back to flannel.
    Rollback,
}

/// What happens to the node's pods. The agent does the same for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Pods run on; only those that can't be adopted are evicted.
    InPlace,
    /// The node is cordoned and drained before, and what a drain leaves is replaced after.
    Drain,
}

impl Strategy {
    /// The annotation's and the environment variable's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InPlace => "in-place",
            Self::Drain => "drain",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Strategy {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        match text {
            "in-place" => Ok(Self::InPlace),
            "drain" => Ok(Self::Drain),
            _ => Err(Unknown { text: text.to_owned(), known: "in-place, drain" }),
        }
    }
}

/// A lease in full: all that an agent needs to know about the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Grant {
    /// Equal to the lease label, or there is no grant.
    pub epoch: Epoch,
    /// How often the leadership has changed hands; never decreases from one grant to the next.
    pub fence: u64,
    /// Where to go.
    pub goal: Goal,
    /// What happens to the pods.
    pub strategy: Strategy,
    /// How long, in seconds, the node may stay outside a rest state from `switching` on before the agent reverts by itself.
    pub budget_seconds: u64,
    /// How long, in seconds from `calico` on, the node keeps the bridge's address for connections of its own that still use it.
    #[serde(default)]
    pub keep_seconds: u64,
    /// flannel, as the coordinator found it.
    pub flannel: FlannelFacts,
    /// Calico, as the coordinator prepared it.
    pub calico: CalicoFacts,
}

/// flannel's configuration, the same on every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlannelFacts {
    /// The cluster's pod networks: flannel's `Network`, and then its `IPv6Network` where it carries both families.
    pub networks: Vec<IpNet>,
    /// VXLAN network identifier; the device is `flannel.<vni>`, and for IPv6 `flannel-v6.<vni>`.
    pub vni: u32,
    /// UDP port of VXLAN.
    pub port: u16,
    /// MTU of the VXLAN device and of pods, in bytes.
    pub mtu: u32,
    /// The directory with CNI configs on the host.
    pub cni_conf_dir: String,
    /// Whether it is Canal: pods have Calico's links already, with addresses from host-local. Not written when false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub canal: bool,
}

/// Calico's configuration, the same on every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CalicoFacts {
    /// File name that Calico's installer gives its config.
    pub cni_conf_name: String,
    /// `cni_network_config` of Calico's ConfigMap: the config with those of its `__PLACEHOLDERS__` that differ from node to node. See
    /// [`crate::template`].
    pub cni_conf_template: String,
    /// MTU of pods, in bytes.
    pub mtu: u32,
    /// TCP port of Felix's health endpoint on the node's loopback.
    pub health_port: u16,
    /// Cluster address and port of the Service `default/kubernetes`, `address:port`.
    pub kube_service_address: String,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(epoch: u64) -> Grant {
        Grant {
            epoch: Epoch::new(epoch).unwrap(),
            fence: 1,
            goal: Goal::Migrate,
            strategy: Strategy::InPlace,
            budget_seconds: 120,
            keep_seconds: 600,
            flannel: FlannelFacts {
                networks: vec!["10.244.0.0/16".parse().unwrap()],
                vni: 1,
                port: 8472,
                mtu: 1450,
                cni_conf_dir: "/etc/cni/net.d".into(),
                canal: false,
            },
            calico: CalicoFacts {
                cni_conf_name: "10-calico.conflist".into(),
                cni_conf_template: "{}".into(),
                mtu: 1450,
                health_port: 9099,
                kube_service_address: "10.96.0.1:443".into(),
            },
        }
    }

    #[test]
    fn a_grant_is_written_as_documented() {
        let text = serde_json::to_string(&sample(3)).unwrap();
        assert_eq!(
            text,
            r#"{"epoch":3,"fence":1,"goal":"migrate","strategy":"in-place","budgetSeconds":120,"keepSeconds":600,"flannel":{"networks":["10.244.0.0/16"],"vni":1,"port":8472,"mtu":1450,"cniConfDir":"/etc/cni/net.d"},"calico":{"cniConfName":"10-calico.conflist","cniConfTemplate":"{}","mtu":1450,"healthPort":9099,"kubeServiceAddress":"10.96.0.1:443"}}"#
        );
        assert_eq!(serde_json::from_str::<Grant>(&text).unwrap(), sample(3));
    }

    #[test]
    fn only_the_canonical_text_of_an_epoch_is_one() {
        for bad in ["", "0", "01", "+1", "-1", " 1", "1 ", "1.0", "x", "18446744073709551616"] {
            assert!(bad.parse::<Epoch>().is_err(), "{bad:?}");
        }
        assert_eq!("18446744073709551615".parse::<Epoch>().unwrap().next().get(), u64::MAX);
        assert!(serde_json::from_str::<Epoch>("0").is_err());
    }

    #[test]
    fn strategies_read_back_what_they_write() {
        for strategy in [Strategy::InPlace, Strategy::Drain] {
            assert_eq!(strategy.as_str().parse(), Ok(strategy));
            assert_eq!(serde_json::to_string(&strategy).unwrap(), format!("\"{strategy}\""));
        }
        assert!("Drain".parse::<Strategy>().is_err());
    }
}
