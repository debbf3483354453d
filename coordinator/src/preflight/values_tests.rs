//! Whatever stands in a setting, an annotation or a configuration: a value or an error that names it, never a panic. Nothing here can
//! write: what is examined is plain data.

use std::collections::BTreeMap;

use clap::{CommandFactory as _, Parser as _};
use proptest::prelude::*;

use super::*;
use crate::args::{Cli, Stated};
use crate::calico::announced;
use crate::cluster::NodeFacts;
use crate::discover;
use crate::settings::tests::detected;
use crate::settings::{self, settle};

/// What people and templates leave in variables, and everything else.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[ -~]{0,24}",
        "-?[0-9]{1,24}%?",
        "[0-9]{1,3}(\\.[0-9]{1,3}){3}(/[0-9]{1,3})?",
        "(true|false|drain|in-place|vxlan|1450|24|10\\.244\\.0\\.0/16)[ a-z]?",
        "[0-9]{1,20}(ms|s|m|h|d|y)",
    ]
}

fn set(stated: &mut Stated, variable: usize, value: &str) -> &'static str {
    let fields: [(&str, &mut Option<String>); 12] = [
        ("FLANNEL_NETWORK", &mut stated.flannel_network),
        ("FLANNEL_DAEMONSET_NAME", &mut stated.flannel_daemonset_name),
        ("FLANNEL_DAEMONSET_NAMESPACE", &mut stated.flannel_daemonset_namespace),
        ("FLANNEL_MTU", &mut stated.flannel_mtu),
        ("FLANNEL_IP_MASQ", &mut stated.flannel_ip_masq),
        ("FLANNEL_SUBNET_LEN", &mut stated.flannel_subnet_len),
        ("FLANNEL_ANNOTATION_PREFIX", &mut stated.flannel_annotation_prefix),
        ("FLANNEL_VNI", &mut stated.flannel_vni),
        ("FLANNEL_PORT", &mut stated.flannel_port),
        ("CALICO_DAEMONSET_NAME", &mut stated.calico_daemonset_name),
        ("CALICO_DAEMONSET_NAMESPACE", &mut stated.calico_daemonset_namespace),
        ("CNI_CONFIG_DIR", &mut stated.cni_config_dir),
    ];
    let (name, field) = fields.into_iter().nth(variable).unwrap();
    *field = Some(value.to_owned());
    name
}

/// All options that take a value.
fn options() -> Vec<String> {
    let command = Cli::command();
    let options = command.get_arguments().filter(|argument| argument.get_action().takes_values());
    options.filter_map(|argument| argument.get_long().map(str::to_owned)).collect()
}

proptest! {
    #[test]
    fn a_setting_is_what_was_detected_or_an_error_that_names_it(variable in 0_usize..12, value in text()) {
        let mut stated = Stated::default();
        let name = set(&mut stated, variable, &value);
        match settle(&stated, &detected()) {
            Ok(settings) => prop_assert_eq!(settings, settings::tests::settings()),
            Err(findings) => {
                prop_assert_eq!(findings.len(), 1);
                let told = findings[0].to_string();
                let quoted = format!("{value:?}");
                prop_assert!(told.contains(name), "{}", told);
                prop_assert!(told.contains(&value) || told.contains(quoted.trim_matches('"')), "{}", told);
                prop_assert!(told.contains("detected is"), "{}", told);
            }
        }
    }

    #[test]
    fn an_option_is_taken_or_refused_by_name(option in 0_usize..64, value in text()) {
        let options = options();
        let option = &options[option % options.len()];
        let argument = format!("--{option}={value}");
        if let Err(error) = Cli::try_parse_from(["coordinator", &argument]) {
            let told = error.to_string();
            prop_assert!(told.contains(&format!("--{option}")), "{}", told);
            prop_assert!(value.is_empty() || told.contains(&value), "{}", told);
        }
    }

    #[test]
    fn flannels_configuration_is_read_or_an_error(text in text(), name in "(Network|Backend|EnableIPv6|x)", value in text()) {
        let _ = discover::net_conf(&text);
        let object = serde_json::json!({ (name): value, "Backend": { "Type": value, "VNI": value } });
        prop_assert!(discover::net_conf(&object.to_string()).is_err());
    }

    #[test]
    fn whatever_flannel_announced_is_read_or_a_finding_that_names_the_node(
        key in "(backend-type|backend-data|public-ip)",
        value in text(),
    ) {
        let prefix = discover::ANNOTATION_PREFIX;
        let mut annotations: BTreeMap<String, String> = [
            ("backend-type", "vxlan"),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"8e:74:9a:30:24:01"}"#),
            ("public-ip", "172.16.0.1"),
        ]
        .into_iter()
        .map(|(key, value)| (format!("{prefix}/{key}"), value.to_owned()))
        .collect();
        annotations.insert(format!("{prefix}/{key}"), value.clone());
        let node = NodeFacts {
            name: "n1".into(),
            ready: true,
            pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
            annotations,
            ..NodeFacts::default()
        };
        let read = announced::flannel_node(&node, prefix, &["10.244.0.0/16".parse().unwrap()]);
        for finding in read.err().into_iter().flatten() {
            let told = finding.to_string();
            prop_assert!(told.contains("Node n1") && told.contains(&value), "{}", told);
        }
        let mut findings = Vec::new();
        nodes::all(&settings::tests::settings(), &[node.into()], false, &mut findings);
    }

    #[test]
    fn a_cni_template_of_any_text_is_judged(template in text()) {
        prop_assert!(calico::foreign_plugins(&template, None).is_empty());
        let mut findings = Vec::new();
        calico::daemon(&settings::tests::settings().calico, Some(&template), 0, &mut findings);
        prop_assert!(findings.iter().all(|finding| finding.reason == "CalicoManifestUnusable"));
    }
}
