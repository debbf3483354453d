//! What the agents tell, and what the coordinator notes about them.

use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::grant::Epoch;
use crate::host::HostFacts;
use crate::state::State;

/// Longest message of a report, in bytes of UTF-8.
pub const MESSAGE_LIMIT: usize = 1024;

/// An agent's report; says why the state label is what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The lease this is about; absent before the node's first lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// The state, as in the label.
    pub state: State,
    /// What the agent is doing or waiting for within the state; for people.
    #[serde(default)]
    pub step: String,
    /// When the state was entered, by the node's clock.
    pub since: Timestamp,
    /// `CamelCase`, stable, the same as the condition's.
    pub reason: String,
    /// For people: what, where, and the remedy; at most [`MESSAGE_LIMIT`] bytes.
    #[serde(default)]
    pub message: String,
    /// Pods that can't be adopted and must be evicted before the switch, in `prepared`; after a rollback, in `flannel`: pods that
    /// Calico made, connected as they are, to be made anew.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evict: Vec<Evict>,
    /// What the agent sees on its host; only in `flannel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostFacts>,
}

impl Report {
    /// The same report with a message of at most [`MESSAGE_LIMIT`] bytes, cut between characters.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        if self.message.len() > MESSAGE_LIMIT {
            const MARK: &str = "...";
            let mut end = MESSAGE_LIMIT - MARK.len();
            while !self.message.is_char_boundary(end) {
                end -= 1;
            }
            self.message.truncate(end);
            self.message.push_str(MARK);
        }
        self
    }
}

/// A pod that can't be adopted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evict {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID, so that its successor of the same name is left alone.
    pub uid: String,
    /// Why not; `CamelCase`.
    pub reason: String,
}

/// A pod that was taken over with its address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// The runtime's sandbox id, which CNI calls container id.
    pub sandbox: String,
    /// The pod's addresses.
    pub ip: Vec<IpAddr>,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub uid: String,
}

/// What the coordinator remembers about a node's failed attempts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failures {
    /// Failed attempts since the last success.
    pub count: u32,
    /// The lease of the last one. Lease numbers go on from here.
    pub last_epoch: Epoch,
    /// Not granted again before, by the coordinator's clock.
    pub retry_after: Timestamp,
    /// Whether the last one had changed the host, and was undone. Only such failures stop other nodes.
    #[serde(default)]
    pub touched: bool,
    /// Why the last one failed; `CamelCase`.
    #[serde(default)]
    pub reason: String,
    /// For people.
    #[serde(default)]
    pub message: String,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Report {
        Report {
            epoch: Epoch::new(3),
            state: State::Prepared,
            step: "waiting for network none".into(),
            since: "2026-01-02T03:04:05Z".parse().unwrap(),
            reason: "Prepared".into(),
            message: "4 pods to adopt".into(),
            evict: vec![],
            host: None,
        }
    }

    #[test]
    fn a_report_is_written_as_documented_and_unknown_fields_are_ignored() {
        let text = serde_json::to_string(&sample()).unwrap();
        assert_eq!(
            text,
            r#"{"epoch":3,"state":"prepared","step":"waiting for network none","since":"2026-01-02T03:04:05Z","reason":"Prepared","message":"4 pods to adopt"}"#
        );
        let newer = text.replacen('{', r#"{"future":{"x":1},"#, 1);
        assert_eq!(serde_json::from_str::<Report>(&newer).unwrap(), sample());
    }

    #[test]
    fn what_a_host_is_like_is_written_as_documented() {
        let text = r#"{"rpFilter":1,"vxlan":[{"name":"flannel.1","vni":1,"port":8472,"mac":"8e:74:9a:30:24:01","mtu":1450}],"plugins":["bridge"],"interfaces":[{"name":"eth0","addresses":["172.31.1.11/24"]}]}"#;
        let host: HostFacts = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&host).unwrap(), text);
        assert_eq!(serde_json::from_str::<HostFacts>("{}").unwrap(), HostFacts::default());
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let long = Report { message: "ä".repeat(2000), ..sample() }.bounded();
        assert!(long.message.len() <= MESSAGE_LIMIT && long.message.ends_with("ä..."));
        assert_eq!(sample().bounded(), sample());
    }

    #[test]
    fn an_adopted_pod_is_written_as_documented() {
        let adopted = Adopted {
            sandbox: "abc".into(),
            ip: vec!["10.244.1.5".parse().unwrap()],
            namespace: "default".into(),
            pod: "web-0".into(),
            uid: "u".into(),
        };
        assert_eq!(
            serde_json::to_string(&[adopted]).unwrap(),
            r#"[{"sandbox":"abc","ip":["10.244.1.5"],"namespace":"default","pod":"web-0","uid":"u"}]"#
        );
    }
}
