use super::*;

fn network() -> IpNet {
    "10.244.0.0/16".parse().unwrap()
}

#[test]
fn a_pool_that_differs_is_told_field_by_field() {
    let wanted = pool(network(), 26, true);
    assert!(pool_differences(&wanted, &wanted).is_empty());
    let other = IpPoolSpec { vxlan_mode: None, nat_outgoing: None, ..wanted.clone() };
    assert_eq!(
        pool_differences(&other, &wanted),
        ["natOutgoing is false, needed is true", "vxlanMode is Never, needed is Always"]
    );
}

#[test]
fn felix_is_never_told_to_leave_vxlan() {
    let settings = crate::settings::tests::settings();
    let now = FelixConfigurationSpec { vxlan_enabled: Some(false), ..FelixConfigurationSpec::default() };
    let changes = felix_changes(&now, &settings);
    assert_eq!(
        Value::from(changes),
        json!({ "vxlanEnabled": null, "vxlanVNI": 1, "vxlanPort": 8472, "vxlanMTU": 1450 })
    );
    let right = FelixConfigurationSpec {
        vxlan_vni: Some(1),
        vxlan_port: Some(8472),
        vxlan_mtu: Some(1450),
        ..FelixConfigurationSpec::default()
    };
    assert!(felix_changes(&right, &settings).is_empty());
}
