use super::*;

fn node(annotations: &[(&str, &str)]) -> NodeFacts {
    NodeFacts {
        name: "n1".into(),
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
        annotations: annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        ..NodeFacts::default()
    }
}

const ANNOTATED: [(&str, &str); 3] = [
    ("f/backend-type", "vxlan"),
    ("f/backend-data", r#"{"VNI":1,"VtepMAC":"8e:74:9a:30:24:01"}"#),
    ("f/public-ip", "172.16.0.1"),
];

fn network() -> [IpNet; 1] {
    ["10.244.0.0/16".parse().unwrap()]
}

fn networks() -> [IpNet; 2] {
    ["10.244.0.0/16".parse().unwrap(), "fd00:10:244::/56".parse().unwrap()]
}

fn dual_stack() -> NodeFacts {
    let mut node = node(&ANNOTATED);
    node.pod_cidrs.push("fd00:10:244:1::/64".parse().unwrap());
    node.annotations.insert("f/backend-v6-data".into(), r#"{"VNI":1,"VtepMAC":"8e:74:9a:30:26:01"}"#.into());
    node.annotations.insert("f/public-ipv6".into(), "fd00:172::1".into());
    node
}

#[test]
fn a_node_is_what_flannel_says() {
    let flannel = flannel_node(&dual_stack(), "f", &networks()).unwrap();
    let [v4, v6] = &flannel[..] else { panic!("{flannel:?}") };
    assert_eq!(v4.tunnel.to_string(), "10.244.1.0");
    assert_eq!(v4.mac, "8e:74:9a:30:24:01");
    assert_eq!(v4.public, IpAddr::from([172, 16, 0, 1]));
    assert_eq!((v6.tunnel.to_string().as_str(), v6.mac.as_str()), ("fd00:10:244:1::", "8e:74:9a:30:26:01"));
    assert_eq!(v6.public.to_string(), "fd00:172::1");
    // In whichever order Kubernetes names its networks.
    let mut turned = dual_stack();
    turned.pod_cidrs.reverse();
    assert_eq!(flannel_node(&turned, "f", &networks()).unwrap(), flannel);
    assert_eq!(flannel_node(&dual_stack(), "f", &network()).unwrap().len(), 1, "without IPv6 nobody asks");
}

#[test]
fn what_is_wrong_in_both_families_is_told_at_once_and_what_is_shared_once() {
    let mut node = dual_stack();
    node.annotations.insert("f/public-ip".into(), "fd00:172::1".into());
    node.annotations.remove("f/backend-v6-data");
    let found = flannel_node(&node, "f", &networks()).unwrap_err();
    let told: Vec<&str> = found.iter().map(|finding| finding.found.as_str()).collect();
    assert_eq!(
        told,
        ["annotation f/public-ip is no IPv4 address: fd00:172::1", "annotation f/backend-v6-data is missing"]
    );
    node.annotations.insert("f/backend-type".into(), "host-gw".into());
    assert_eq!(flannel_node(&node, "f", &networks()).unwrap_err().len(), 1);
}

#[test]
fn a_node_without_usable_annotations_is_a_finding() {
    for (key, value, reason) in [
        ("f/backend-type", "host-gw", "BackendNotVxlan"),
        ("f/backend-data", "{}", "NodeNotAnnotatedByFlannel"),
        ("f/backend-data", "null", "NodeNotAnnotatedByFlannel"),
        ("f/backend-data", r#"{"VtepMAC":"8e:74"}"#, "NodeNotAnnotatedByFlannel"),
        ("f/public-ip", "fe80::1", "NodeNotAnnotatedByFlannel"),
    ] {
        let mut node = node(&ANNOTATED);
        node.annotations.insert(key.into(), value.into());
        assert_eq!(flannel_node(&node, "f", &network()).unwrap_err()[0].reason, reason, "{key}={value}");
        node.annotations.remove(key);
        assert!(flannel_node(&node, "f", &network()).is_err());
    }
    let outside = flannel_node(&node(&ANNOTATED), "f", &["10.245.0.0/16".parse().unwrap()]).unwrap_err();
    assert_eq!(outside[0].reason, "PodCidrOutsideNetwork");
}

#[test]
fn a_node_that_joined_is_announced_so_that_flannels_own_words_lead_back_to_it() {
    let mut joined = node(&[]);
    joined.pod_cidrs.push("fd00:10:244:1::/64".parse().unwrap());
    joined.addresses = vec![[172, 16, 0, 9].into()];
    assert_eq!(joined_node(&joined, &networks()).unwrap_err().reason, "JoinedNodeIncomplete");
    assert_eq!(joined_node(&joined, &network()).unwrap().len(), 1);
    joined.addresses.push("fd00:172::9".parse().unwrap());
    let made = joined_node(&joined, &networks()).unwrap();
    assert_ne!(made[0].mac, made[1].mac);
    let mut settings = crate::settings::tests::settings();
    settings.flannel.annotation_prefix = "f".into();
    let announced = flannel_annotations(&made, &settings);
    joined
        .annotations
        .extend(announced.into_iter().map(|(key, value)| (key, value.as_str().unwrap().to_owned())));
    assert_eq!(flannel_node(&joined, "f", &networks()), Ok(made));
}

#[test]
fn annotations_that_are_right_are_not_written_again() {
    let mut node = dual_stack();
    let flannel = flannel_node(&node, "f", &networks()).unwrap();
    let changes = annotation_changes(&node, &flannel);
    assert_eq!(
        Value::from(changes.clone()),
        json!({
            "projectcalico.org/IPv4Address": "172.16.0.1/32",
            "projectcalico.org/IPv4VXLANTunnelAddr": "10.244.1.0",
            "projectcalico.org/VXLANTunnelMACAddr": "8e:74:9a:30:24:01",
            "projectcalico.org/IPv6Address": "fd00:172::1/128",
            "projectcalico.org/IPv6VXLANTunnelAddr": "fd00:10:244:1::",
            "projectcalico.org/VXLANTunnelMACAddrV6": "8e:74:9a:30:26:01",
        })
    );
    node.annotations
        .extend(changes.into_iter().map(|(key, value)| (key, value.as_str().unwrap().to_owned())));
    assert!(annotation_changes(&node, &flannel).is_empty());
    node.annotations.insert(Family::V4.node_address().into(), "172.16.0.1/24".into());
    assert!(annotation_changes(&node, &flannel).is_empty(), "the detected prefix length stays");
}

#[test]
fn a_node_is_labelled_and_annotated_by_one_write_and_by_none_when_it_is_so() {
    let mut node = node(&ANNOTATED);
    let flannel = flannel_node(&node, "f", &network()).unwrap();
    let both = patch(&node, &flannel, Some(Network::Flannel), Map::new()).unwrap();
    assert_eq!(both["metadata"]["labels"], json!({ keys::NETWORK: "flannel" }));
    assert_eq!(both["metadata"]["annotations"].as_object().unwrap().len(), 3);
    let written = annotation_changes(&node, &flannel);
    node.annotations
        .extend(written.into_iter().map(|(key, value)| (key, value.as_str().unwrap().to_owned())));
    assert_eq!(patch(&node, &flannel, None, Map::new()), None);
    let label = patch(&node, &flannel, Some(Network::Calico), Map::new()).unwrap();
    assert_eq!(label, json!({ "metadata": { "labels": { keys::NETWORK: "calico" } } }));
    let more = Map::from_iter([("f/public-ip".to_owned(), json!("172.16.0.9"))]);
    let announced = patch(&node, &flannel, None, more).unwrap();
    assert_eq!(announced["metadata"]["annotations"], json!({ "f/public-ip": "172.16.0.9" }));
}
