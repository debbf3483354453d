use clap::Parser as _;
use flannel_migration_protocol::{Epoch, Field};

use super::*;
use crate::args::Cli;

fn policy() -> Policy {
    Cli::try_parse_from(["coordinator"]).unwrap().options.policy
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + seconds).unwrap()
}

fn node(name: &str, network: Network, state: State) -> NodeFacts {
    let mut node = NodeFacts { name: name.into(), ready: true, linux: true, ..NodeFacts::default() };
    node.view.network = Field::Present(network);
    node.view.state = Field::Present(state);
    node
}

fn shared(nodes: &[NodeFacts]) -> Vec<Arc<NodeFacts>> {
    nodes.iter().cloned().map(Arc::new).collect()
}

fn compose(nodes: &[NodeFacts], own: Option<&str>, noted: &Noted, policy: &Policy, now: Timestamp) -> Status {
    super::compose(&shared(nodes), own, noted, policy, now)
}

fn leased(mut node: NodeFacts) -> NodeFacts {
    node.view.lease = Field::Present(Epoch::FIRST);
    node
}

fn rolling() -> Noted {
    let took = |seconds| NodeNoted {
        leased_at: Some(at(0)),
        migrated_at: Some(at(seconds)),
        ..NodeNoted::default()
    };
    Noted {
        phase: Phase::Roll,
        nodes: BTreeMap::from([
            ("a".to_owned(), took(8)),
            ("b".to_owned(), took(12)),
            ("c".to_owned(), NodeNoted { leased_at: Some(at(12)), ..NodeNoted::default() }),
        ]),
        ..Noted::default()
    }
}

#[test]
fn what_is_left_is_estimated_by_what_was_done() {
    let nodes = [
        node("a", Network::Calico, State::Calico),
        node("b", Network::Calico, State::Calico),
        leased(node("c", Network::None, State::Switching)),
        node("d", Network::Flannel, State::Flannel),
        node("e", Network::Flannel, State::Flannel),
    ];
    let status = compose(&nodes, None, &rolling(), &policy(), at(16));
    // Ten seconds each on average: six of the running node's, then two more.
    assert_eq!(status.progress, Progress { done: 2, total: 5, remaining_seconds: Some(26) });
    let first = Noted { nodes: BTreeMap::new(), ..rolling() };
    assert_eq!(compose(&nodes, None, &first, &policy(), at(16)).progress.remaining_seconds, None);
}

#[test]
fn a_node_names_whom_it_waits_for() {
    let nodes =
        [leased(node("c", Network::None, State::Switching)), node("d", Network::Flannel, State::Flannel)];
    let mut noted = rolling();
    // Its lease and grant differ: an alarm, which holds the other.
    let status = compose(&nodes, None, &noted, &policy(), at(16));
    assert_eq!(status.alarms[0].reason, "GrantMismatch");
    assert_eq!(status.nodes[1].waiting_for.as_deref(), Some("a person to look at"));
    noted.phase = Phase::Prepare;
    assert_eq!(compose(&nodes, None, &noted, &policy(), at(16)).nodes[1].waiting_for, None);
    let mut unready = node("c", Network::Flannel, State::Flannel);
    unready.ready = false;
    let nodes = [unready, node("d", Network::Flannel, State::Flannel)];
    let status = compose(&nodes, None, &rolling(), &policy(), at(16));
    assert_eq!(status.nodes[0].waiting_for.as_deref(), Some("its kubelet to be ready"));
    assert_eq!(status.nodes[1].waiting_for.as_deref(), Some("a free slot (c)"));
}

#[test]
fn of_many_in_the_way_a_few_are_named() {
    let busy = (0..9).map(|i| leased(node(&format!("a{i}"), Network::None, State::Switching)));
    let mut nodes: Vec<NodeFacts> = busy.collect();
    nodes.push(node("z", Network::Flannel, State::Flannel));
    let nodes = shared(&nodes);
    let words = |node: &Arc<NodeFacts>| {
        let waiting = Waiting { node: Arc::clone(node), reason: "NoFreeSlot", until: None };
        super::words(&waiting, &Ways::of(&nodes))
    };
    assert_eq!(words(&nodes[9]), "a free slot (a0, a1, a2, a3, a4 and 4 more)");
    assert_eq!(words(&nodes[1]), "a free slot (a0, a2, a3, a4, a5 and 3 more)");
}

#[test]
fn after_the_end_the_condition_says_what_the_labels_said() {
    let gone = NodeFacts { name: "a".into(), migrated: true, ready: true, ..NodeFacts::default() };
    let noted = Noted { phase: Phase::Complete, ..rolling() };
    let status = compose(&[gone], None, &noted, &policy(), at(60));
    assert_eq!(status.progress.done, 1);
    assert_eq!(status.nodes[0].state.as_deref(), Some("calico"));
    assert_eq!(status.nodes[0].migrated_at, Some(at(8)));
}

#[test]
fn a_node_that_says_nothing_has_a_row() {
    let silent = NodeFacts { name: "n".into(), ..NodeFacts::default() };
    let status = compose(&[silent], None, &Noted::default(), &policy(), at(0));
    assert_eq!((status.nodes[0].node.as_str(), &status.nodes[0].state), ("n", &None));
}

#[test]
fn what_is_noted_survives_the_coordinator() {
    let nodes = ["a", "b", "c"].map(|name| node(name, Network::Flannel, State::Flannel));
    let text = serde_json::to_string(&compose(&nodes, None, &rolling(), &policy(), at(16))).unwrap();
    let back = Noted::from(&serde_json::from_str::<Status>(&text).unwrap());
    for (name, noted) in rolling().nodes {
        assert_eq!(back.nodes[&name].leased_at, noted.leased_at, "{name}");
        assert_eq!(back.nodes[&name].migrated_at, noted.migrated_at, "{name}");
    }
}
