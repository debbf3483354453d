//! What Felix leaves in nftables, as Felix of Calico 3.32.1 has written it: read in the verification, removed on the way back.

#![allow(clippy::unwrap_used, reason = "all of it is tests")]

mod world;

use std::collections::BTreeSet;

use flannel_migration_agent::host::{nft, tables};
use flannel_migration_agent::inventory::interface_name;
use flannel_migration_agent::journal::Journal;
use flannel_migration_agent::probe::{self, Baseline, From, Kind, Probe};
use flannel_migration_agent::steps::{Op, apply};
use flannel_migration_agent::{policies, work};
use flannel_migration_protocol::State;
use world::{World, sh};

/// Tables of all three families, on a node with four pods that knows of one other node, 192.0.2.3.
const FELIX: &str = include_str!("world/felix.nft");
/// The interfaces of the pods in it. Their policies: two for egress with one selector, one for egress, one for ingress, none.
const INTERFACES: [&str; 4] = ["cali33333333333", "cali22222222222", "cali11111111111", "cali00000000000"];

/// What Felix's iptables mode leaves when a cluster changes to nftables.
const STALE: &str = r#"*filter
:cali-FORWARD - [0:0]
:cali-fw-cali0123456789a - [0:0]
-A FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD
-A cali-FORWARD -i cali+ -m comment --comment "cali:8ZoYfO5HKXWbB3pk" -j cali-fw-cali0123456789a
-A cali-fw-cali0123456789a -m comment --comment "cali:c6zTqDzDQ7vMTO8Q" -j DROP
COMMIT
"#;

/// Others' tables, some of them with a name of Felix's in another family.
const OTHERS: [&str; 5] = ["ip kube-proxy", "ip6 kube-proxy", "ip calico-users", "inet calico", "arp calico"];

fn load_others(world: &World) {
    let tables = OTHERS.map(|table| format!("table {table} {{\n chain mine {{\n counter accept\n }}\n}}\n"));
    world.script("nft -f -", &tables.concat());
}

fn others(world: &World) -> String {
    OTHERS.map(|table| sh(&format!("ip netns exec {} nft list table {table}", world.node()))).concat()
}

fn felix(world: &World) -> String {
    let pods = world.pods.iter().map(|pod| interface_name("default", &pod.name));
    INTERFACES.iter().zip(pods).fold(FELIX.to_owned(), |text, (from, to)| text.replace(from, &to))
}

fn listed(world: &World) -> String {
    sh(&format!("ip netns exec {} nft list tables", world.node()))
}

/// A node that is about to be verified.
fn switched(world: &World) -> Journal {
    let mut journal = world.captured(true);
    let site = world.site(true);
    world.switch(&mut journal, &site);
    world.inside(|| Op::CLEAN.into_iter().for_each(|op| apply(&mut journal, &site, op).unwrap()));
    journal.enter(State::Verifying, "Switched", "").unwrap();
    journal
}

fn echo(from: From) -> Probe {
    Probe { from, kind: Kind::Echo([10, 244, 2, 5].into(), 84) }
}

#[test]
fn on_the_way_back_all_that_felix_has_in_nftables_goes_and_nothing_of_others() {
    let world = World::new(2);
    load_others(&world);
    let (before, foreign) = (world.snapshot(), others(&world));
    let mut journal = switched(&world);
    let site = world.site(true);
    let answered = || world.inside(|| probe::missing(&known(echo(From::Host))).is_empty());
    assert!(answered());
    world.script("nft -f -", &felix(&world));
    for restore in ["iptables-nft-restore", "iptables-legacy-restore", "ip6tables-nft-restore"] {
        world.script(&format!("{restore} --noflush"), STALE);
    }
    assert!(!answered(), "Felix drops what comes from nodes that it doesn't know");

    // Twice: a crash may come before it is noted.
    let captured = journal.entry.captured.clone();
    for _ in 0..2 {
        journal.entry.captured.clone_from(&captured);
        journal.enter(State::Reverting, "RollbackGranted", "").unwrap();
        world.inside(|| work::undo(&mut journal, &site, "RollbackGranted", "").unwrap());
        assert_eq!(journal.entry.state, State::Flannel, "{}", journal.entry.message);
        let left = listed(&world);
        for gone in ["table ip calico", "table ip6 calico", "table arp calico-arp"] {
            assert!(left.lines().all(|line| line != gone), "{gone} in\n{left}");
        }
        assert_eq!(others(&world), foreign);
        world.assert_same(&before, "after the way back");
        assert!(answered(), "a node that joined later is cut off");
    }
}

#[test]
fn a_node_on_which_felix_has_no_tables_goes_back_as_well() {
    let world = World::new(1);
    let before = listed(&world);
    let mut journal = switched(&world);
    journal.enter(State::Reverting, "BudgetExceeded", "").unwrap();
    let site = world.site(true);
    world.inside(|| work::undo(&mut journal, &site, "BudgetExceeded", "").unwrap());
    assert_eq!((journal.entry.state, listed(&world)), (State::Flannel, before));
}

#[test]
fn a_table_is_found_and_deleted_by_family_and_name_and_only_where_it_is() {
    let world = World::new(0);
    load_others(&world);
    let before = others(&world);
    world.inside(|| {
        let there = || nft::FELIX.map(|name| tables::is_there(name).unwrap());
        assert_eq!(there(), [false; 3]);
        tables::delete(&nft::FELIX).unwrap();
        world.script("nft -f -", FELIX);
        assert_eq!(there(), [true; 3]);
        tables::delete(&nft::FELIX[1..]).unwrap();
        assert_eq!(there(), [true, false, false]);
        tables::delete(&nft::FELIX).unwrap();
        assert_eq!(there(), [false; 3]);
    });
    assert_eq!(others(&world), before);
}

#[test]
fn canals_own_tables_stay_and_those_that_came_with_calico_go() {
    let world = World::new(1);
    let mut journal = world.captured(true);
    let site = world.site(true);
    let mut canal = journal.entry.captured.clone().unwrap();
    (canal.canal, canal.policies) = (true, vec!["ip calico".into()]);
    world.script("nft -f -", FELIX);
    journal.entry.captured = Some(canal);
    journal.enter(State::Reverting, "RollbackGranted", "").unwrap();
    world.inside(|| work::undo(&mut journal, &site, "RollbackGranted", "").unwrap());
    let left = listed(&world);
    assert!(left.contains("table ip calico\n"), "{left}");
    assert!(!left.contains("ip6 calico") && !left.contains("calico-arp"), "{left}");
}

#[test]
fn what_a_policy_in_nftables_forbids_is_not_expected_of_a_pod() {
    let world = World::new(4);
    let mut journal = switched(&world);
    let site = world.site(true);
    world.script("nft -f -", &felix(&world).replace("192.0.2.3", "192.0.2.2"));
    let from = |pod: &world::Pod| From::Pod(pod.name.clone(), format!("/var/run/netns/{}", pod.netns));
    let probes = world.pods.iter().map(|pod| echo(from(pod)));
    journal.entry.baseline.worked = probes.chain([echo(From::Host)]).collect();
    world.inside(|| {
        let missing: Vec<String> =
            probe::missing(&journal.entry.baseline).iter().map(ToString::to_string).collect();
        assert_eq!(missing, ["pod-0 -> 10.244.2.5 (84 bytes)", "pod-1 -> 10.244.2.5 (84 bytes)"]);
        let lost = work::verify(&mut journal, &site).unwrap();
        assert_eq!((lost, journal.entry.state), (0, State::Calico), "{}", journal.entry.message);
        let restricted: BTreeSet<String> =
            ["pod-0", "pod-1"].map(|pod| interface_name("default", pod)).into();
        assert_eq!(policies::restricted().unwrap(), restricted);
    });
}

fn known(probe: Probe) -> Baseline {
    Baseline { worked: [probe].into(), ..Baseline::default() }
}
