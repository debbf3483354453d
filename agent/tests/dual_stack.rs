//! The switch on real devices with IPv6 beside IPv4: nothing of either is lost, and what is undone is as it was.

#![allow(clippy::unwrap_used, reason = "all of it is tests")]

mod world;

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use flannel_migration_agent::echo::echo;
use flannel_migration_agent::host::{connections, netns};
use flannel_migration_agent::steps::{Op, apply, bridge, detour, undo};
use flannel_migration_agent::{calicos, probe, work};
use flannel_migration_protocol::State;
use world::{World, sh, six};

fn reaches(from: &str, to: IpAddr) -> bool {
    netns::run(&Path::new("/run/netns").join(from), || echo(to, 84, Duration::from_secs(3)).is_ok()).unwrap()
}

#[test]
fn pods_of_both_families_change_over_and_back_while_they_talk() {
    let world = World::dual(5);
    let before = world.snapshot();
    let mut journal = world.captured(true);
    let site = world.site(true);
    let probers = world.probe(Duration::from_millis(5), 5);
    world.switch(&mut journal, &site);
    let node = world.node();
    let links = sh(&format!("ip -n {node} -o link"));
    assert!(!links.contains("flannel-v6.1") && links.contains("vxlan-v6.calico"), "{links}");
    let routes = sh(&format!("ip -n {node} -6 route"));
    for pod in &world.pods {
        let (six, cali) =
            (pod.six.unwrap(), flannel_migration_agent::inventory::interface_name("default", &pod.name));
        assert!(routes.contains(&format!("{six} dev {cali}")), "{routes}");
        let inside = sh(&format!("ip -n {} -6 route", pod.netns));
        let ways: Vec<&str> = inside.lines().filter(|line| !line.starts_with("fe80::/64")).collect();
        assert_eq!(ways.len(), 1, "{inside}");
        assert!(ways[0].starts_with("default via fe80:"), "{inside}");
    }
    probers.none_lost("there");
    for pod in &world.pods {
        // The host answers for the pod's gateway also when nobody has told the pod where it is.
        sh(&format!("ip -n {} -6 neigh flush dev eth0 nud all", pod.netns));
        assert!(reaches(&pod.netns, six::OUTSIDE.into()), "{} can't find its gateway", pod.name);
    }

    let probers = world.probe(Duration::from_millis(5), 5);
    world.inside(|| undo(&mut journal, &site).unwrap());
    probers.none_lost("back");
    world.assert_same(&before, "after the undo");
}

#[test]
fn the_pods_of_a_full_node_change_over_while_they_talk() {
    let world = World::dual(110);
    let mut journal = world.captured(true);
    let site = world.site(true);
    let probers = world.probe(Duration::from_millis(20), 4);
    world.switch(&mut journal, &site);
    probers.none_lost("full");
}

#[test]
fn peers_pods_of_any_block_are_reached_while_felix_takes_over_and_when_the_node_goes_back() {
    let world = World::dual(3);
    let before = world.snapshot();
    let mut journal = world.captured(true);
    let site = world.site(true);
    let node = world.node();
    let probers = world.probe(Duration::from_millis(5), 3);
    world.switch(&mut journal, &site);
    // As Felix does at its start: no address but its own, no route that it doesn't know; some time later its own.
    sh(&format!(
        "ip -n {node} -6 address flush dev vxlan-v6.calico scope link
         ip -n {node} -6 route flush dev vxlan-v6.calico
         sleep 1
         ip -n {node} -6 route add fd00:10:244:2::/122 via fd00:10:244:2:: dev vxlan-v6.calico onlink
         ip -n {node} -6 route add blackhole fd00:10:244:1::/122 proto 80"
    ));
    probers.none_lost("Felix");

    let probers = world.probe(Duration::from_millis(5), 3);
    world.inside(|| {
        calicos::make_way(&journal).unwrap();
        undo(&mut journal, &site).unwrap();
    });
    probers.none_lost("back");
    world.assert_same(&before, "after the undo");

    world.switch(&mut journal, &site);
    let look =
        || sh(&format!("ip -n {node} -6 rule; ip -n {node} -6 route show table {} || true", steps_table()));
    assert!(look().contains("32765:") && look().contains("fd00:10:244:2::/64 via"), "{}", look());
    for _ in 0..2 {
        world.inside(|| work::forget_peers(&journal).unwrap());
        assert!(!look().contains("32765:") && !look().contains("fd00"), "{}", look());
    }
}

const fn steps_table() -> u32 {
    flannel_migration_agent::steps::peers::TABLE
}

#[test]
fn what_worked_before_over_either_family_is_asked_for_afterwards() {
    let world = World::dual(2);
    let mut journal = world.captured(true);
    let site = world.site(true);
    let (grant, known) = (world.grant(), world.known());
    world.inside(|| work::prepare(&mut journal, &site, &grant, Some(&known)).unwrap());
    let baseline = journal.entry.baseline.clone();
    let worked: Vec<String> = baseline.worked.iter().map(ToString::to_string).collect();
    for probe in [
        "the node -> fd00:10:244:2:: (84 bytes)",
        "the node -> fd00:10:244:2:: (1430 bytes)",
        "the node -> fd00:10:244:1::3 (84 bytes)",
        "default/pod-0 -> fd00:10:244:2:: (1430 bytes)",
        "default/pod-1 -> 10.244.2.0 (1450 bytes)",
    ] {
        assert!(worked.iter().any(|text| text == probe), "{probe} isn't in {worked:?}");
    }
    world.switch(&mut journal, &site);
    let missing = || world.inside(|| probe::missing(&baseline));
    assert!(missing().is_empty(), "{:?}", missing());
    // A device that carries IPv6 no more, whatever IPv4 does.
    sh(&format!("bridge -n {} fdb del 0a:00:00:00:06:02 dst 2001:db8::2 dev vxlan-v6.calico", world.node()));
    let gone: Vec<String> = missing().iter().map(ToString::to_string).collect();
    assert_eq!(gone.len(), 4, "{gone:?}");
    assert!(gone.iter().all(|probe| probe.contains("fd00:10:244:2::")), "{gone:?}");
}

#[test]
fn what_the_node_itself_talks_about_with_its_pods_goes_on_until_it_ends() {
    let world = World::dual(2);
    let before = world.snapshot();
    let to = |pod: usize| IpAddr::V6(world.pods[pod].six.unwrap());
    let mut connection = world.connect(&world.pods[0], to(0));
    assert_eq!(connection.source(), six::GATEWAY, "the kernel takes the bridge's address");
    connection.talk();
    let mut journal = world.captured(true);
    let site = world.site(true);
    world.switch(&mut journal, &site);
    connection.talk();
    let kept = bridge::addresses(journal.entry.captured.as_ref().unwrap()).unwrap();
    assert_eq!(kept, ["10.244.1.1", six::GATEWAY].map(|address| address.parse::<IpAddr>().unwrap()));
    let in_use = |kept: &[IpAddr]| world.inside(|| connections::any_from(kept));
    assert!(in_use(&kept));
    // What begins now comes from elsewhere.
    let mut later = world.connect(&world.pods[1], to(1));
    later.talk();
    assert_ne!(later.source(), six::GATEWAY);

    world.inside(|| undo(&mut journal, &site).unwrap());
    connection.talk();
    world.assert_same(&before, "after the undo");

    world.switch(&mut journal, &site);
    connection.talk();
    drop(connection);
    assert!(!in_use(&kept));
    world.inside(|| bridge::let_go(&kept).unwrap());
    assert!(!sh(&format!("ip -n {} address", world.node())).contains(six::GATEWAY));
}

#[test]
fn no_pod_is_redirected_past_its_host() {
    let world = World::dual(3);
    let before = world.snapshot();
    let mut journal = world.captured(true);
    let site = world.site(true);
    // Between all pods: which of them has the bridge's hardware address at its host's end makes a difference.
    let mut connections = Vec::new();
    for from in &world.pods {
        for to in world.pods.iter().filter(|to| to.address != from.address) {
            connections.push(World::connect_from(&from.netns, to, to.six.unwrap().into()));
        }
    }
    // The kernel redirects a sender once in a second.
    let mut talk = || {
        for _ in 0..30 {
            connections.iter_mut().for_each(world::connection::Connection::talk);
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let (held, rest) = Op::SWITCH.split_at(Op::SWITCH.iter().position(|op| *op == Op::MovePods).unwrap());
    world.inside(|| held.iter().for_each(|op| apply(&mut journal, &site, *op).unwrap()));
    talk();
    world.inside(|| rest.iter().for_each(|op| apply(&mut journal, &site, *op).unwrap()));
    talk();
    for pod in &world.pods {
        let setting = "/proc/sys/net/ipv6/conf/eth0/accept_redirects";
        assert_eq!(sh(&format!("ip netns exec {} cat {setting}", pod.netns)).trim(), "1", "given back");
    }
    world.inside(|| undo(&mut journal, &site).unwrap());
    talk();
    world.assert_same(&before, "after the undo");
}

#[test]
fn no_pod_needs_to_be_asked_while_its_port_leaves_the_bridge() {
    let world = World::dual(2);
    let mut journal = world.captured(true);
    let site = world.site(true);
    let before = Op::SWITCH.into_iter().take_while(|op| *op != Op::MovePods);
    world.inside(|| before.for_each(|op| apply(&mut journal, &site, op).unwrap()));
    for pod in &world.pods {
        let cali = flannel_migration_agent::inventory::interface_name("default", &pod.name);
        for link in ["cni0", &cali] {
            let known = sh(&format!(
                "ip -n {0} neigh show dev {link}; ip -n {0} -6 neigh show dev {link}",
                world.node()
            ));
            for address in pod.addresses() {
                assert!(known.contains(&format!("{address} lladdr")), "{address} on {link}: {known}");
            }
        }
    }
}

#[test]
fn what_a_pod_sends_while_its_port_is_stopped_takes_the_detour() {
    let world = World::dual(1);
    let mut journal = world.captured(true);
    let site = world.site(true);
    let before = Op::SWITCH.into_iter().take_while(|op| *op != Op::MovePods);
    world.inside(|| before.for_each(|op| apply(&mut journal, &site, op).unwrap()));
    let captured = journal.entry.captured.as_ref().unwrap();
    let (bridge, port) = (&captured.bridge.as_ref().unwrap().link, captured.pods[0].cali.clone());
    let (node, pod) = (world.node(), &world.pods[0]);
    // As in the kernel between a port's stop and its end. What is for the pod goes straight to it.
    sh(&format!(
        "ip -n {node} route add {} dev {port}; bridge -n {node} link set dev {port} state 0",
        pod.six.unwrap()
    ));
    let answered = || six::REMOTE.into_iter().all(|to| reaches(&pod.netns, to.into()));
    assert!(!answered(), "what a stopped port gets is dropped");
    assert!(world.inside(|| detour::around(&[port], bridge, answered)), "there is no detour");
    assert!(!answered(), "the detour is still open");
}

#[test]
fn a_kernel_that_renames_no_link_that_is_up_gets_all_back_in_the_same_call() {
    let world = World::dual(3);
    let before = world.snapshot();
    let mut journal = world.captured(false);
    let site = world.site(false);
    world.switch(&mut journal, &site);
    world.probe(Duration::from_millis(10), 3).none_lost("there");
    world.inside(|| undo(&mut journal, &site).unwrap());
    std::thread::sleep(Duration::from_millis(1500));
    world.probe(Duration::from_millis(10), 3).none_lost("back");
    world.assert_same(&before, "after the undo");
}

#[test]
fn a_crash_after_any_operation_or_in_the_middle_of_it_is_undone_or_gone_on_with() {
    let world = World::dual(2);
    six::ask_nobody(&world);
    world.crash_everywhere();
}

#[test]
fn a_pod_that_calico_made_is_reached_by_those_that_go_back_and_keeps_its_addresses() {
    let mut world = World::dual(2);
    let mut journal = world.captured(true);
    let site = world.site(true);
    world.switch(&mut journal, &site);
    let (guest, _, addresses) = six::calicos_pod(&mut world);
    journal.entry.state = State::Reverting;
    journal.write().unwrap();
    world.inside(|| work::undo(&mut journal, &site, "RollbackGranted", "").unwrap());
    assert_eq!((journal.entry.state, journal.entry.evict.len()), (State::Flannel, 1), "{:?}", journal.entry);
    for address in addresses {
        assert!(world.path(&format!("cni/networks/cbr0/{address}")).exists(), "{address} isn't reserved");
        for pod in &world.pods {
            assert!(reaches(&pod.netns, address), "{} can't reach {address}", pod.name);
        }
    }
    for to in world.pods.iter().flat_map(world::Pod::addresses).chain([six::REMOTE[1].into()]) {
        assert!(reaches(&guest, to), "the guest can't reach {to}");
    }
}
