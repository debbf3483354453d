//! A Node's protocol keys, read. Reading never fails: what can't be read is a value.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::de::DeserializeOwned;

use crate::grant::{Epoch, Grant, Strategy};
use crate::keys;
use crate::report::{Adopted, Failures, Report};
use crate::request::Request;
use crate::state::{Network, State};

/// A value that is there but can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The key it was under.
    pub key: &'static str,
    /// Why it can't be read; for people.
    pub why: String,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.why)
    }
}

/// What one key holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Field<T> {
    /// The key isn't there.
    #[default]
    Absent,
    /// The key is there, and its text isn't what the protocol allows.
    Malformed(Malformed),
    /// The key holds this.
    Present(T),
}

impl<T> Field<T> {
    /// The value; `None` when it is absent or malformed.
    #[must_use]
    pub const fn get(&self) -> Option<&T> {
        match self {
            Self::Present(value) => Some(value),
            Self::Absent | Self::Malformed(_) => None,
        }
    }

    /// Whether the key isn't there. A malformed value is there.
    #[must_use]
    pub const fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }

    /// Why the value can't be read, if so.
    #[must_use]
    pub const fn malformed(&self) -> Option<&Malformed> {
        match self {
            Self::Malformed(malformed) => Some(malformed),
            Self::Absent | Self::Present(_) => None,
        }
    }
}

/// All that the protocol says about one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// [`keys::LEASE`]
    pub lease: Field<Epoch>,
    /// [`keys::GRANT`]
    pub grant: Field<Grant>,
    /// [`keys::CORDONED`]: whether the coordinator cordoned the node. Text other than `true` isn't ours, and doesn't uncordon.
    pub cordoned: bool,
    /// [`keys::FAILURES`]
    pub failures: Field<Failures>,
    /// [`keys::STATE`]; absent until the node's agent has reported.
    pub state: Field<State>,
    /// [`keys::REPORT`]
    pub report: Field<Report>,
    /// [`keys::ADOPTED`]
    pub adopted: Field<Vec<Adopted>>,
    /// [`keys::KEPT`]
    pub kept: Field<Vec<IpAddr>>,
    /// [`keys::STRATEGY`]
    pub strategy: Field<Strategy>,
    /// [`keys::PAUSE`]: whether the administrator holds the node back.
    pub paused: bool,
    /// [`keys::REQUEST`]
    pub request: Field<Request>,
    /// [`keys::NETWORK`]
    pub network: Field<Network>,
}

type Texts = BTreeMap<String, String>;

impl NodeView {
    /// Reads a Node's `metadata.labels` and `metadata.annotations`. Every input is a view.
    #[must_use]
    pub fn parse(labels: &Texts, annotations: &Texts) -> Self {
        Self {
            lease: text(labels, keys::LEASE),
            grant: json(annotations, keys::GRANT),
            cordoned: annotations.get(keys::CORDONED).is_some_and(|value| value == "true"),
            failures: json(annotations, keys::FAILURES),
            state: text(labels, keys::STATE),
            report: json(annotations, keys::REPORT),
            adopted: json(annotations, keys::ADOPTED),
            kept: json(annotations, keys::KEPT),
            strategy: text(annotations, keys::STRATEGY),
            paused: labels.contains_key(keys::PAUSE),
            request: text(annotations, keys::REQUEST),
            network: text(labels, keys::NETWORK),
        }
    }

    /// Whether the node counts against max-unavailable because of the migration: a lease is there, or the state is not at rest, or
    /// one of both can't be read.
    #[must_use]
    pub fn slot_used(&self) -> bool {
        !self.lease.is_absent()
            || match &self.state {
                Field::Absent => false,
                Field::Malformed(_) => true,
                Field::Present(state) => !state.at_rest(),
            }
    }

    /// The grant in force: lease and grant are both well formed and agree on the epoch.
    #[must_use]
    pub fn granted(&self) -> Option<&Grant> {
        let lease = self.lease.get()?;
        self.grant.get().filter(|grant| grant.epoch == *lease)
    }

    /// The state, if the agent's label and its report agree on it and the report is about the lease in force.
    #[must_use]
    pub fn answered(&self) -> Option<State> {
        let grant = self.granted()?;
        let state = *self.state.get()?;
        let report = self.report.get()?;
        (report.state == state && report.epoch == Some(grant.epoch)).then_some(state)
    }

    /// The highest epoch that this node's keys mention; a new lease must be higher. `None`: there was none.
    #[must_use]
    pub fn last_epoch(&self) -> Option<Epoch> {
        [
            self.lease.get().copied(),
            self.grant.get().map(|grant| grant.epoch),
            self.report.get().and_then(|report| report.epoch),
            self.failures.get().map(|failures| failures.last_epoch),
        ]
        .into_iter()
        .flatten()
        .max()
    }

    /// Everything that can't be read.
    #[must_use]
    pub fn malformed(&self) -> Vec<&Malformed> {
        [
            self.lease.malformed(),
            self.grant.malformed(),
            self.failures.malformed(),
            self.state.malformed(),
            self.report.malformed(),
            self.adopted.malformed(),
            self.kept.malformed(),
            self.strategy.malformed(),
            self.request.malformed(),
            self.network.malformed(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

fn text<T>(texts: &Texts, key: &'static str) -> Field<T>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    field(texts, key, |text| text.parse().map_err(|error: T::Err| error.to_string()))
}

fn json<T: DeserializeOwned>(texts: &Texts, key: &'static str) -> Field<T> {
    field(texts, key, |text| serde_json::from_str(text).map_err(|error| error.to_string()))
}

fn field<T>(texts: &Texts, key: &'static str, read: impl FnOnce(&str) -> Result<T, String>) -> Field<T> {
    match texts.get(key).map(|text| read(text)) {
        None => Field::Absent,
        Some(Ok(value)) => Field::Present(value),
        Some(Err(why)) => Field::Malformed(Malformed { key, why }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::grant::tests::sample as grant;
    use crate::report::tests::sample as report;

    fn texts(pairs: &[(&str, &str)]) -> Texts {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn leased(lease: &str, grant_text: &str, state: &str) -> NodeView {
        NodeView::parse(
            &texts(&[(keys::LEASE, lease), (keys::STATE, state)]),
            &texts(&[(keys::GRANT, grant_text)]),
        )
    }

    #[test]
    fn a_node_without_keys_is_free_and_has_no_grant() {
        let view = NodeView::parse(&Texts::new(), &Texts::new());
        assert_eq!(view, NodeView::default());
        assert!(!view.slot_used() && view.granted().is_none() && view.last_epoch().is_none());
    }

    #[test]
    fn lease_and_grant_must_agree() {
        let text = serde_json::to_string(&grant(3)).unwrap();
        assert_eq!(leased("3", &text, "flannel").granted(), Some(&grant(3)));
        for (lease, text) in [("4", text.as_str()), ("2", &text), ("x", &text), ("3", "{}"), ("3", "")] {
            let view = leased(lease, text, "flannel");
            assert!(view.granted().is_none(), "{lease} {text}");
            assert!(view.slot_used(), "{lease} {text}");
        }
    }

    #[test]
    fn a_slot_is_used_until_the_lease_is_gone_and_the_state_is_at_rest() {
        let slot = |labels: &[(&str, &str)]| NodeView::parse(&texts(labels), &Texts::new()).slot_used();
        for state in State::ALL {
            assert_eq!(slot(&[(keys::STATE, state.as_str())]), !state.at_rest(), "{state}");
            assert!(slot(&[(keys::STATE, state.as_str()), (keys::LEASE, "1")]), "{state}");
        }
        assert!(slot(&[(keys::STATE, "nonsense")]));
        assert!(slot(&[(keys::LEASE, "nonsense")]));
    }

    #[test]
    fn an_answer_is_about_the_lease_in_force() {
        let view = |lease: u64, state: &str| {
            NodeView::parse(
                &texts(&[(keys::LEASE, &lease.to_string()), (keys::STATE, state)]),
                &texts(&[
                    (keys::GRANT, &serde_json::to_string(&grant(lease)).unwrap()),
                    (keys::REPORT, &serde_json::to_string(&report()).unwrap()),
                ]),
            )
        };
        assert_eq!(view(3, "prepared").answered(), Some(State::Prepared));
        assert_eq!(view(4, "prepared").answered(), None);
        assert_eq!(view(3, "flannel").answered(), None);
    }

    #[test]
    fn bad_text_is_named_with_its_key() {
        let view = NodeView::parse(
            &texts(&[(keys::LEASE, "0"), (keys::STATE, "?"), (keys::NETWORK, "?")]),
            &texts(&[
                (keys::GRANT, "["),
                (keys::REPORT, "1"),
                (keys::ADOPTED, "{}"),
                (keys::FAILURES, "{}"),
                (keys::STRATEGY, "?"),
                (keys::REQUEST, "?"),
                (keys::CORDONED, "yes"),
            ]),
        );
        let named: Vec<_> = view.malformed().into_iter().map(|malformed| malformed.key).collect();
        let all = [
            keys::LEASE,
            keys::GRANT,
            keys::FAILURES,
            keys::STATE,
            keys::REPORT,
            keys::ADOPTED,
            keys::STRATEGY,
            keys::REQUEST,
            keys::NETWORK,
        ];
        assert_eq!(named, all);
        assert!(!view.cordoned);
    }

    fn any_text() -> impl proptest::strategy::Strategy<Value = String> {
        prop_oneof![
            ".{0,40}",
            "[0-9]{1,21}",
            "(flannel|calico|none|stuck|prepared|drain)",
            r#"\{"epoch":[0-9]{1,3}.{0,20}\}?"#
        ]
    }

    proptest! {
        #[test]
        fn every_text_is_a_view_and_what_cannot_be_read_keeps_its_slot(
            lease in proptest::option::of(any_text()),
            state in proptest::option::of(any_text()),
            grant_text in proptest::option::of(any_text()),
            report_text in proptest::option::of(any_text()),
        ) {
            let pairs = |pairs: [(&str, Option<String>); 2]| -> Texts {
                pairs.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
            };
            let labels = pairs([(keys::LEASE, lease), (keys::STATE, state)]);
            let annotations = pairs([(keys::GRANT, grant_text), (keys::REPORT, report_text)]);
            let view = NodeView::parse(&labels, &annotations);
            if view.lease.malformed().is_some() || view.state.malformed().is_some() {
                prop_assert!(view.slot_used());
            }
            if view.lease.malformed().is_some() || view.grant.malformed().is_some() {
                prop_assert!(view.granted().is_none());
            }
        }

        #[test]
        fn a_grant_reads_back_what_it_writes(
            epoch in 1..=u64::MAX, fence: u64, vni in 0u32..1 << 24, port: u16, mtu: u32, dir in ".{0,30}", template in "\\PC{0,200}",
        ) {
            let mut written = grant(epoch);
            written.fence = fence;
            written.flannel.vni = vni;
            written.flannel.port = port;
            written.flannel.mtu = mtu;
            written.flannel.cni_conf_dir = dir;
            written.calico.cni_conf_template = template;
            let view = leased(&epoch.to_string(), &serde_json::to_string(&written).unwrap(), "flannel");
            prop_assert_eq!(view.granted(), Some(&written));
            prop_assert_eq!(view.last_epoch(), Epoch::new(epoch));
        }
    }
}
