//! What an agent has to say of its node, and how urgent that is. Pure.

use std::net::IpAddr;

use flannel_migration_protocol::{Adopted, HostFacts, NodeView, Report, State, keys};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::journal::Entry;

/// Everything that the agent says of its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    report: Report,
    adopted: Option<Vec<Adopted>>,
    kept: Option<Vec<IpAddr>>,
}

/// How much of the news a node says already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// All.
    All,
    /// All but step and message: words for people, on which nothing depends.
    ButWords,
    /// Less.
    No,
}

/// What the condition says: status, reason, message.
pub type Condition = (&'static str, String, String);

impl News {
    /// What the journal says, with the step for people.
    #[must_use]
    pub fn of(entry: &Entry, step: &str, host: Option<&HostFacts>) -> Self {
        let report = Report {
            epoch: entry.epoch,
            state: entry.state,
            step: step.to_owned(),
            since: entry.since,
            reason: entry.reason.clone(),
            message: entry.message.clone(),
            evict: entry.to_evict().to_vec(),
            host: host.filter(|_| entry.state == State::Flannel).cloned(),
        };
        Self {
            report: report.bounded(),
            adopted: entry.adopted().map(|pods| pods.iter().map(|pod| pod.adopted.clone()).collect()),
            kept: (!entry.kept.is_empty()).then(|| entry.kept.clone()),
        }
    }

    /// The same with these pods taken over.
    #[must_use]
    pub fn with_adopted(self, adopted: Option<Vec<Adopted>>) -> Self {
        Self { adopted, ..self }
    }

    /// How much of it a node says.
    #[must_use]
    pub fn said_by(&self, view: &NodeView) -> Said {
        let keys = view.state.get() == Some(&self.report.state)
            && view.adopted.get() == self.adopted.as_ref()
            && view.adopted.malformed().is_none()
            && view.kept.get() == self.kept.as_ref()
            && view.kept.malformed().is_none();
        let Some(said) = view.report.get().filter(|_| keys) else { return Said::No };
        if *said == self.report {
            return Said::All;
        }
        let (step, message) = (self.report.step.clone(), self.report.message.clone());
        if (Report { step, message, ..said.clone() }) == self.report { Said::ButWords } else { Said::No }
    }

    /// The condition that goes with it.
    #[must_use]
    pub fn condition(&self) -> Condition {
        let status = match self.report.state {
            State::Calico => "True",
            State::Flannel | State::Stuck => "False",
            _ => "Unknown",
        };
        (status, self.report.reason.clone(), self.report.message.clone())
    }

    /// All of it as one strategic merge patch of the node's status, with the version as its precondition: a write that the API server takes
    /// late, after newer ones, would tell what isn't true any more. `turned`: the condition's status is another one than before.
    #[must_use]
    pub fn patch(&self, version: &str, now: Timestamp, turned: bool) -> Value {
        let text = |value: Value| Value::String(value.to_string());
        let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let (status, reason, message) = self.condition();
        let mut condition = json!({
            "type": keys::CONDITION, "status": status, "reason": reason, "message": message, "lastHeartbeatTime": now,
        });
        if let Some(condition) = condition.as_object_mut().filter(|_| turned) {
            condition.insert("lastTransitionTime".into(), now.into());
        }
        json!({
            "metadata": {
                "resourceVersion": version,
                "labels": { keys::STATE: self.report.state.as_str() },
                "annotations": {
                    keys::REPORT: text(json!(self.report)),
                    keys::ADOPTED: self.adopted.as_ref().map(|pods| text(json!(pods))),
                    keys::KEPT: self.kept.as_ref().map(|addresses| text(json!(addresses))),
                },
            },
            "status": { "conditions": [condition] },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::journal::Journal;

    fn entry() -> Entry {
        let directory = tempfile::tempdir().unwrap();
        Journal::open(directory.path(), "n1").unwrap().entry
    }

    /// The node after it was written.
    fn view(news: &News) -> NodeView {
        let patch = news.patch("7", Timestamp::UNIX_EPOCH, true);
        let texts = |part: &str| -> BTreeMap<String, String> {
            let texts = patch["metadata"][part].as_object().unwrap().iter();
            texts.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
        };
        NodeView::parse(&texts("labels"), &texts("annotations"))
    }

    #[test]
    fn what_was_written_is_said() {
        let news = News::of(&entry(), "waiting for a lease", Some(&HostFacts::default()));
        assert_eq!(news.said_by(&view(&news)), Said::All);
        assert_eq!(news.said_by(&NodeView::default()), Said::No);
    }

    #[test]
    fn only_step_and_message_can_wait() {
        let entry = Entry { message: "one".into(), ..entry() };
        let said = view(&News::of(&entry, "waiting", None));
        let of = |change: &dyn Fn(&mut Entry)| {
            let mut changed = entry.clone();
            change(&mut changed);
            News::of(&changed, "waiting", None).said_by(&said)
        };
        assert_eq!(News::of(&entry, "waiting for another", None).said_by(&said), Said::ButWords);
        assert_eq!(of(&|entry| entry.message = "two".into()), Said::ButWords);
        assert_eq!(of(&|entry| entry.reason = "RpFilterNotStrict".into()), Said::No);
        assert_eq!(of(&|entry| entry.state = State::Preparing), Said::No);
        assert_eq!(of(&|entry| entry.kept = vec!["10.244.1.1".parse().unwrap()]), Said::No);
        assert_eq!(
            News::of(&entry, "waiting", Some(&HostFacts::default())).said_by(&said),
            Said::No,
            "what the host is like is judged"
        );
    }

    #[test]
    fn a_long_message_is_said_once() {
        let entry = Entry { message: "x".repeat(5000), ..entry() };
        let news = News::of(&entry, "", None);
        assert_eq!(news.said_by(&view(&news)), Said::All);
    }

    #[test]
    fn the_condition_turns_when_its_status_does() {
        let news = News::of(&entry(), "", None);
        let condition =
            |turned| news.patch("7", Timestamp::UNIX_EPOCH, turned)["status"]["conditions"][0].clone();
        assert_eq!(condition(true)["lastTransitionTime"], "1970-01-01T00:00:00Z");
        assert!(condition(false).get("lastTransitionTime").is_none());
        assert_eq!(condition(false)["reason"], "NotStarted");
        assert_eq!(condition(false)["status"], "False");
    }
}
