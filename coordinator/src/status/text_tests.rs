use super::*;
use crate::status::{Coordinator, PolicyStatus, Progress};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + seconds).unwrap()
}

fn sample() -> Status {
    let node = |name: &str, network: &str, state: &str| NodeStatus {
        node: name.to_owned(),
        network: Some(network.to_owned()),
        state: Some(state.to_owned()),
        strategy: Some("in-place".to_owned()),
        since: Some(at(-9)),
        ready: true,
        ..NodeStatus::default()
    };
    let done = NodeStatus {
        adopted: Some(12),
        evicted: Some(0),
        reason: "Verified".into(),
        ..node("n1", "calico", "calico")
    };
    let running = NodeStatus {
        lease: Some(1),
        step: "moving pods".into(),
        reason: "Switching".into(),
        cordoned: true,
        ..node("n2", "none", "switching")
    };
    let waiting =
        NodeStatus { waiting_for: Some("a free slot (n2)".into()), ..node("n3", "flannel", "flannel") };
    Status {
        phase: Phase::Roll,
        coordinator: Some(Coordinator {
            identity: "flannel-migration-x".into(),
            version: "0.1.0".into(),
            renewed: Some(at(-2)),
        }),
        started: Some(at(-60)),
        policy: Some(PolicyStatus {
            strategy: "in-place".into(),
            max_unavailable: "1".into(),
            max_failures: 3,
            drain_timeout_seconds: 300,
            node_budget_seconds: 120,
        }),
        progress: Progress { done: 1, total: 3, remaining_seconds: Some(14) },
        nodes: vec![done, running, waiting],
        ..Status::default()
    }
}

#[test]
fn columns_are_as_wide_as_their_widest_cell() {
    let rows = [vec!["n1".to_owned(), "calico".to_owned()], vec!["a-long-name".to_owned(), "-".to_owned()]];
    assert_eq!(table(&["NODE", "STATE"], &rows), "NODE         STATE\nn1           calico\na-long-name  -");
}

#[test]
fn the_screen_tells_the_phase_each_node_and_who_waits_for_whom() {
    let expected = "\
phase roll: 1 of 3 nodes migrated, about 14s to go; strategy in-place, 1 at a time
coordinator flannel-migration-x (version 0.1.0), heard of 2s ago

NODE  NETWORK  STATE                SINCE  STRATEGY  ADOPTED  EVICTED  REASON     NOW
n1    calico   calico               9s     in-place  12       0        Verified
n2    none     switching, cordoned  9s     in-place  -        -        Switching  moving pods
n3    flannel  flannel              9s     in-place  -        -        -          waits for a free slot (n2)";
    assert_eq!(screen(&sample(), at(0)), expected);
}

#[test]
fn a_migration_that_nobody_leads_says_so() {
    let orphaned = Status { coordinator: None, ..sample() };
    assert!(screen(&orphaned, at(0)).contains("NO COORDINATOR LEADS"));
    let done = Status { phase: Phase::Complete, ..orphaned };
    assert!(screen(&done, at(0)).contains("no coordinator runs"));
}

#[test]
fn alarms_and_findings_come_with_their_remedy() {
    let mut status = sample();
    status.alarms.push(crate::status::AlarmStatus {
        node: "n2".into(),
        reason: "NodeStuck".into(),
        message: "do this".into(),
    });
    let text = screen(&status, at(0));
    assert!(
        text.ends_with("a person is needed; no further node is started:\n  n2: NodeStuck: do this"),
        "{text}"
    );
    status.findings.push(crate::status::FindingStatus {
        severity: "blocking".into(),
        reason: "NodeNotReady".into(),
        object: "Node n3".into(),
        found: "it isn't ready".into(),
        remedy: "Repair it.".into(),
    });
    assert!(!screen(&status, at(0)).contains("Node n3"), "a finding of the preflight is over");
    status.phase = Phase::Preflight;
    assert!(screen(&status, at(0)).contains("NodeNotReady: Node n3: it isn't ready. Repair it."));
}

#[test]
fn away_from_a_terminal_only_what_changed_is_told() {
    let before = sample();
    assert_eq!(changes(None, &before, at(0)).len(), 4);
    assert_eq!(changes(Some(&before), &before, at(5)), Vec::<String>::new());
    let mut after = before.clone();
    after.nodes[1].state = Some("verifying".into());
    after.nodes[1].step = "another step".into();
    assert_eq!(
        changes(Some(&before), &after, at(5)),
        ["22:13:25 n2: network none, state verifying (Switching)"]
    );
}

#[test]
fn ages_are_short() {
    assert_eq!([span(7), span(119), span(200), span(7300)], ["7s", "119s", "3m20s", "2h1m"]);
}
