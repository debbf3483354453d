use std::net::Ipv4Addr;

use rstest::rstest;

use super::*;
use crate::host::routes;
use rtnetlink::packet_route::RouteNetlinkMessage;

struct Scene {
    attachments: Vec<Attachment>,
    links: Vec<Link>,
    inside: HashMap<String, Inside>,
    pods: Option<Vec<Known>>,
    dual: bool,
    link_locals: BTreeMap<u32, Ipv6Addr>,
}

fn via(destination: &str, gateway: [u8; 4]) -> RouteMessage {
    match routes::via(destination.parse().unwrap(), Ipv4Addr::from(gateway).into(), 2).message {
        RouteNetlinkMessage::NewRoute(route) => route,
        other => panic!("{other:?} is no route"),
    }
}

// A node with one pod that can be adopted.
fn scene() -> Scene {
    let attachment = Attachment {
        sandbox: "s1".into(),
        network: "cbr0".into(),
        interface: "eth0".into(),
        netns: "/var/run/netns/x".into(),
        namespace: "default".into(),
        pod: "web".into(),
        uid: "u1".into(),
        addresses: vec!["10.244.1.2/24".parse().unwrap()],
        gateways: vec![[10, 244, 1, 1].into()],
        ..Attachment::default()
    };
    let veth =
        Link { index: 7, name: "veth1".into(), kind: "veth".into(), master: Some(5), ..Link::default() };
    let inside = Inside {
        link: Link { index: 2, name: "eth0".into(), peer: Some(7), ..Link::default() },
        addresses: attachment.addresses.clone(),
        routes: vec![via("0.0.0.0/0", [10, 244, 1, 1]), via("10.244.0.0/16", [10, 244, 1, 1])],
        more_links: false,
        accept_redirects: Some("1".into()),
    };
    let known =
        Known { namespace: "default".into(), name: "web".into(), uid: "u1".into(), ..Known::default() };
    Scene {
        attachments: vec![attachment],
        links: vec![veth],
        inside: HashMap::from([("s1".to_owned(), inside)]),
        pods: Some(vec![known]),
        dual: false,
        link_locals: BTreeMap::new(),
    }
}

fn taken(scene: &Scene) -> Inventory {
    let bridge = Link { index: 5, name: "cni0".into(), kind: "bridge".into(), ..Link::default() };
    take(&Facts {
        networks: &["cbr0".to_owned()],
        attachments: &scene.attachments,
        links: &scene.links,
        bridge: Some(&bridge),
        canal: false,
        dual: scene.dual,
        link_locals: &scene.link_locals,
        inside: &scene.inside,
        pods: scene.pods.as_deref(),
    })
}

// The same pod with IPv6 beside IPv4.
fn dual(scene: &mut Scene) {
    scene.dual = true;
    scene.attachments[0].addresses.push("fd00:10:244:1::2/64".parse().unwrap());
    scene.attachments[0].gateways.push("fd00:10:244:1::1".parse().unwrap());
    let addresses = scene.attachments[0].addresses.clone();
    inner(scene).addresses = addresses;
    for destination in ["::/0", "fd00:10:244::/56"] {
        inner(scene).routes.push(via_v6(destination));
    }
    scene.links[0].mac = vec![0x0a, 0x58, 0, 0, 0, 1];
    scene.link_locals.insert(7, "fe80::858:ff:fe00:1".parse().unwrap());
}

fn via_v6(destination: &str) -> RouteMessage {
    let gateway = "fd00:10:244:1::1".parse().unwrap();
    match routes::via(destination.parse().unwrap(), gateway, 2).message {
        RouteNetlinkMessage::NewRoute(route) => route,
        other => panic!("{other:?} is no route"),
    }
}

// The same pod as Canal makes it.
fn canals(scene: &mut Scene) -> Inventory {
    let RouteNetlinkMessage::NewRoute(on_link) = routes::add_on_link(pods::GATEWAY.into(), 2).message else {
        panic!("no route")
    };
    scene.links[0] = Link { name: interface_name("default", "web"), master: None, ..scene.links[0].clone() };
    inner(scene).routes = vec![on_link, via("0.0.0.0/0", pods::GATEWAY.octets())];
    inner(scene).addresses = vec!["10.244.1.2/32".parse().unwrap()];
    take(&Facts {
        networks: &["cbr0".to_owned()],
        attachments: &scene.attachments,
        links: &scene.links,
        bridge: None,
        canal: true,
        dual: scene.dual,
        link_locals: &scene.link_locals,
        inside: &scene.inside,
        pods: scene.pods.as_deref(),
    })
}

#[test]
fn canals_pods_have_calicos_links_and_are_registered_as_they_are() {
    let inventory = canals(&mut scene());
    assert!(inventory.evict.is_empty(), "{:?}", inventory.evict);
    assert_eq!(inventory.adopt[0].veth, inventory.adopt[0].cali);
    let mut renamed = scene();
    canals(&mut renamed);
    renamed.attachments[0].pod = "other".into();
    renamed.pods = None;
    let inventory = canals(&mut renamed);
    assert_eq!(inventory.evict[0].reason, "NotCalicosLink");
}

#[test]
fn a_pod_whose_namespace_is_not_named_is_evicted_and_not_forgotten() {
    let mut scene = scene();
    scene.inside.clear();
    assert_eq!(taken(&scene).ignored.len(), 1, "the namespace is gone");
    scene.attachments[0].netns.clear();
    assert_eq!(taken(&scene).evict[0].reason, "NamespaceUnknown");
    scene.pods = Some(Vec::new());
    assert_eq!(taken(&scene).ignored.len(), 1, "the pod is gone");
}

fn inner(scene: &mut Scene) -> &mut Inside {
    scene.inside.get_mut("s1").unwrap()
}

#[test]
fn a_pod_as_flannel_makes_it_is_adopted_under_the_name_that_felix_expects() {
    let inventory = taken(&scene());
    assert_eq!(inventory.adopt.len(), 1, "{inventory:?}");
    assert_eq!(inventory.adopt[0].cali, interface_name("default", "web"));
    assert!(inventory.evict.is_empty() && inventory.ignored.is_empty() && inventory.strangers.is_empty());
}

#[test]
fn a_pod_of_both_families_gets_its_host_ends_own_address_as_its_gateway() {
    let mut scene = scene();
    dual(&mut scene);
    let pod = taken(&scene).adopt.remove(0);
    assert_eq!(pod.adopted.ip, ["10.244.1.2", "fd00:10:244:1::2"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    assert_eq!(pod.gateway, Some([10, 244, 1, 1].into()));
    assert_eq!(pod.routes.len(), 4);
    let own = V6 {
        interface: "eth0".into(),
        accept_redirects: Some("1".into()),
        gateway: Some("fd00:10:244:1::1".parse().unwrap()),
        next_hop: scene.link_locals[&7],
        made: false,
    };
    assert_eq!(pod.v6, Some(own.clone()));

    // The bridge's redirects would come from that address as well.
    scene.link_locals.insert(5, scene.link_locals[&7]);
    let made = V6 { next_hop: "fe80::858:66:6d00:1".parse().unwrap(), made: true, ..own };
    assert_eq!(taken(&scene).adopt[0].v6.as_ref(), Some(&made));
    scene.link_locals.clear();
    assert_eq!(taken(&scene).adopt[0].v6, Some(made), "the host end has none");
}

#[test]
fn a_pod_of_before_ipv6_is_adopted_and_what_it_learnt_of_ipv6_is_left_alone() {
    let mut scene = scene();
    scene.dual = true;
    inner(&mut scene).routes.push(via_v6("::/0"));
    let pod = taken(&scene).adopt.remove(0);
    assert_eq!((pod.v6, pod.routes.len()), (None, 2));
}

#[rstest]
#[case::no_ipv6_in_flannel("UnexpectedAddresses", |scene: &mut Scene| scene.dual = false)]
#[case::two_addresses_of_a_family("UnexpectedAddresses", |scene: &mut Scene| {
    let more: IpNet = "fd00:10:244:1::3/64".parse().unwrap();
    inner(scene).addresses.push(more);
    scene.attachments[0].addresses.push(more);
})]
#[case::no_default_route("RoutesChanged", |scene: &mut Scene| inner(scene).routes.retain(|route| {
    links::destination(route).is_some_and(|net| net.addr().is_ipv4() || net.prefix_len() > 0)
}))]
#[case::no_address_for_the_host("NoLinkLocalAddress", |scene: &mut Scene| {
    scene.link_locals.clear();
    scene.links[0].mac.clear();
})]
fn a_pod_of_both_families_but_of_another_shape_is_evicted(
    #[case] reason: &str,
    #[case] change: fn(&mut Scene),
) {
    let mut scene = scene();
    dual(&mut scene);
    change(&mut scene);
    let inventory = taken(&scene);
    assert!(inventory.adopt.is_empty(), "{inventory:?}");
    assert_eq!(inventory.evict[0].reason, reason);
}

#[rstest]
#[case::shaped("BandwidthShaped", |scene: &mut Scene| scene.attachments[0].shaped = true)]
#[case::second_interface("MoreInterfaces", |scene: &mut Scene| inner(scene).more_links = true)]
#[case::second_network("MoreInterfaces", |scene: &mut Scene| {
    let other = Attachment { network: "macvlan".into(), interface: "net1".into(), ..scene.attachments[0].clone() };
    scene.attachments.push(other);
})]
#[case::not_on_the_bridge("NotOnTheBridge", |scene: &mut Scene| scene.links[0].master = None)]
#[case::address_changed("AddressesChanged", |scene: &mut Scene| inner(scene).addresses.push("10.9.9.9/32".parse().unwrap()))]
#[case::foreign_route("RoutesChanged", |scene: &mut Scene| inner(scene).routes.push(via("10.8.0.0/16", [10, 244, 1, 9])))]
#[case::no_default_route("RoutesChanged", |scene: &mut Scene| inner(scene).routes.clear())]
#[case::two_sandboxes("TwoSandboxes", |scene: &mut Scene| {
    let twin = Attachment { sandbox: "s2".into(), ..scene.attachments[0].clone() };
    scene.attachments.push(twin);
    let inside = scene.inside["s1"].clone();
    scene.inside.insert("s2".into(), inside);
})]
fn a_pod_of_another_shape_is_evicted_for_a_reason(#[case] reason: &str, #[case] change: fn(&mut Scene)) {
    let mut scene = scene();
    change(&mut scene);
    let inventory = taken(&scene);
    assert!(inventory.adopt.is_empty(), "{inventory:?}");
    let reasons: Vec<_> = inventory.evict.iter().map(|evict| evict.reason.as_str()).collect();
    assert_eq!(reasons, [reason]);
}

#[rstest]
#[case::namespace_gone(|scene: &mut Scene| scene.inside.clear())]
#[case::pod_gone(|scene: &mut Scene| scene.pods = Some(Vec::new()))]
#[case::pod_replaced(|scene: &mut Scene| scene.pods.as_mut().unwrap()[0].uid = "u2".into())]
#[case::pod_finished(|scene: &mut Scene| scene.pods.as_mut().unwrap()[0].finished = true)]
fn a_sandbox_that_nobody_needs_is_left_alone(#[case] change: fn(&mut Scene)) {
    let mut scene = scene();
    change(&mut scene);
    let inventory = taken(&scene);
    assert_eq!((inventory.adopt.len(), inventory.evict.len(), inventory.ignored.len()), (0, 0, 1));
}

#[test]
fn without_the_api_every_pod_on_record_is_taken_as_existing() {
    let mut scene = scene();
    scene.pods = None;
    assert_eq!(taken(&scene).adopt.len(), 1);
}

#[test]
fn a_port_that_no_record_explains_is_named() {
    let mut scene = scene();
    scene.links.push(Link {
        index: 9,
        name: "veth9".into(),
        kind: "veth".into(),
        master: Some(5),
        ..Link::default()
    });
    assert_eq!(taken(&scene).strangers, ["veth9"]);
}
