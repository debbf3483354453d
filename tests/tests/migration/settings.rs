//! The environment variables that users know.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use flannel_migration_tests::{
    bed::{Bed, flannel::documents},
    migration, run,
    shape::{Layout, NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{bed, complete, expect_migrated, expect_same, picture};

/// The coordinator's program as the image holds it.
pub fn coordinator() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| source.join("target"), PathBuf::from);
    let built = fs::read_dir(target).unwrap().flatten().map(|entry| entry.path().join("bed/coordinator"));
    built.into_iter().find(|path| path.is_file()).expect("the static coordinator is built")
}

/// What the Job does, started on `node` itself: a pod for each setting would take minutes.
fn coordinate(bed: &Bed, node: &str, environment: &[(&str, &str)]) -> Output {
    let kubeconfig = bed.plan.kubeconfig_inside("admin");
    let program = coordinator();
    let mut args = vec!["env".to_owned(), format!("KUBECONFIG={}", kubeconfig.display())];
    args.extend(environment.iter().map(|(name, value)| format!("{name}={value}")));
    args.extend([program.display().to_string(), "run".to_owned()]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let command: Command = bed.exec_command(node, &args).unwrap();
    // A run that isn't refused must not go on for ever.
    let mut bounded = Command::new("timeout");
    bounded.arg("30").arg(command.get_program()).args(command.get_args());
    bounded.output().unwrap()
}

/// Runs the preflight Job as users do: whether it said go, and its log.
fn preflight(bed: &Bed, environment: &[(&str, &str)]) -> (bool, String) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/preflight/preflight.yaml");
    let mut objects = documents(&fs::read_to_string(file).unwrap()).unwrap();
    let job = objects.iter_mut().find(|object| object["kind"] == "Job").unwrap();
    let variables: Vec<Value> =
        environment.iter().map(|(name, value)| json!({ "name": name, "value": value })).collect();
    job["spec"]["template"]["spec"]["containers"][0]["env"] = json!(variables);
    bed.apply(&objects).unwrap();
    let job = ["-n", "kube-system", "job", "flannel-migration-preflight"];
    let mut go = None;
    run::wait_for("the preflight Job is over", Duration::from_mins(1), || {
        let job = bed.get(&job)?;
        let conditions = job["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let is = |kind: &str| conditions.iter().any(|it| it["type"] == kind && it["status"] == "True");
        go = is("Complete").then_some(true).or(is("Failed").then_some(false));
        Ok(go.is_some())
    })
    .unwrap();
    let log = bed.kubectl(&["-n", "kube-system", "logs", "job/flannel-migration-preflight"]).unwrap();
    let mut all = bed.kubectl_command(&["delete", "-f", "-"]).unwrap();
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
    run::output_with_input(&mut all, list.to_string().as_bytes()).unwrap();
    (go.unwrap(), log)
}

#[test]
fn settings_that_contradict_the_cluster_stop_before_anything_is_written_and_right_ones_are_taken() {
    let shape = Shape {
        nodes: NodeShape::numbered(2),
        pod_cidr: "10.42.0.0/16".parse().unwrap(),
        node_prefix: 25,
        vni: 4096,
        port: 4789,
        layout: Layout::Older,
        ..Shape::default()
    };
    let scratch = bed("m-settings", shape);
    let bed = &scratch.bed;
    let mtu = bed.exec("n1", &["cat", "/sys/class/net/flannel.4096/mtu"]).unwrap().trim().to_owned();
    let daemonset = "kube-system/kube-flannel-ds-amd64";
    let calico = "kube-system/calico-node";
    let before = picture(bed);
    for (variable, value, detected) in [
        ("FLANNEL_NETWORK", "10.99.0.0/16", "10.42.0.0/16"),
        ("FLANNEL_NETWORK", "10.42", "10.42.0.0/16"),
        ("FLANNEL_DAEMONSET_NAME", "kube-flannel-ds", daemonset),
        ("FLANNEL_DAEMONSET_NAMESPACE", "kube-flannel", daemonset),
        ("FLANNEL_MTU", "1399", &mtu),
        ("FLANNEL_MTU", "large", &mtu),
        ("FLANNEL_IP_MASQ", "false", "true"),
        ("FLANNEL_IP_MASQ", "perhaps", "true"),
        ("FLANNEL_SUBNET_LEN", "24", "25"),
        ("FLANNEL_SUBNET_LEN", "/25", "25"),
        ("FLANNEL_ANNOTATION_PREFIX", "flannel.example.org", "flannel.alpha.coreos.com"),
        ("FLANNEL_VNI", "1", "4096"),
        ("FLANNEL_VNI", "-1", "4096"),
        ("FLANNEL_PORT", "8472", "4789"),
        ("FLANNEL_PORT", "65536", "4789"),
        ("CALICO_DAEMONSET_NAME", "calico", calico),
        ("CALICO_DAEMONSET_NAMESPACE", "calico-system", calico),
        ("CNI_CONFIG_DIR", "/etc/kubernetes/cni/net.d", "/etc/cni/net.d"),
    ] {
        let output = coordinate(bed, "n1", &[(variable, value)]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{variable}={value}: {text}");
        for word in [variable, value, &format!("detected is {detected}")] {
            assert!(text.contains(word), "{variable}={value}: {word:?} is not in {text}");
        }
    }
    let (go, log) = preflight(bed, &[]);
    assert!(go && log.contains("AgentsMissing") && !log.contains("fatal"), "{log}");
    let (go, log) = preflight(bed, &[("FLANNEL_VNI", "1")]);
    assert!(!go && log.contains("SettingContradictsCluster"), "{log}");
    for (variable, value) in [
        ("STRATEGY", "sideways"),
        ("MAX_UNAVAILABLE", "0"),
        ("DRAIN_TIMEOUT", "soon"),
        ("MAX_FAILURES", "none"),
        ("NODE_BUDGET", "0"),
    ] {
        let output = coordinate(bed, "n1", &[(variable, value)]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let option = format!("--{}", variable.to_lowercase().replace('_', "-"));
        assert_eq!(output.status.code(), Some(2), "{variable}={value}: {text}");
        assert!(text.contains(value) && text.contains(&option), "{variable}={value}: {text}");
    }
    expect_same(&before, &picture(bed));

    migration::apply(
        bed,
        &[
            ("FLANNEL_NETWORK", "10.42.0.0/16"),
            ("FLANNEL_DAEMONSET_NAME", "kube-flannel-ds-amd64"),
            ("FLANNEL_DAEMONSET_NAMESPACE", "kube-system"),
            ("FLANNEL_MTU", &mtu),
            ("FLANNEL_IP_MASQ", "true"),
            ("FLANNEL_SUBNET_LEN", "25"),
            ("FLANNEL_ANNOTATION_PREFIX", "flannel.alpha.coreos.com"),
            ("FLANNEL_VNI", "4096"),
            ("FLANNEL_PORT", "4789"),
            ("CALICO_DAEMONSET_NAME", "calico-node"),
            ("CALICO_DAEMONSET_NAMESPACE", "kube-system"),
            ("CNI_CONFIG_DIR", "/etc/cni/net.d"),
        ],
    )
    .unwrap();
    let took = complete(bed, Duration::from_mins(2));
    eprintln!("m-settings: 1/1 after {:.1} s", took.as_secs_f32());
    expect_migrated(bed);
}
