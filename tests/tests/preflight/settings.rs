//! Values of settings that make no sense, or contradict the cluster: refused by name, and nothing is written.

use super::{cluster::start, world::World};

/// What stands in environments by mistake.
const NONSENSE: [&str; 8] =
    ["-1", "4294967296", "\u{ff11}", "true ", "10.0.0.0/33", "{}", "0x1F", "no\u{202e}way"];
/// Read next to what was detected.
const DETECTED: [&str; 12] = [
    "FLANNEL_NETWORK",
    "FLANNEL_DAEMONSET_NAME",
    "FLANNEL_DAEMONSET_NAMESPACE",
    "FLANNEL_MTU",
    "FLANNEL_IP_MASQ",
    "FLANNEL_SUBNET_LEN",
    "FLANNEL_ANNOTATION_PREFIX",
    "FLANNEL_VNI",
    "FLANNEL_PORT",
    "CALICO_DAEMONSET_NAME",
    "CALICO_DAEMONSET_NAMESPACE",
    "CNI_CONFIG_DIR",
];
/// Read before anything else.
const POLICY: [&str; 8] = [
    "STRATEGY",
    "MAX_UNAVAILABLE",
    "DRAIN_TIMEOUT",
    "MAX_FAILURES",
    "NODE_BUDGET",
    "IMAGE_TIMEOUT",
    "PREFLIGHT_TIMEOUT",
    "LOG_FORMAT",
];

pub fn all(world: &mut World) {
    for (i, variable) in DETECTED.iter().enumerate() {
        for value in [NONSENSE[i % NONSENSE.len()], NONSENSE[(i + 3) % NONSENSE.len()]] {
            let (status, text) = start(world, &[(variable, value)]);
            assert_eq!(status, Some(1), "{variable}={value}: {text}");
            let quoted = format!("{value:?}");
            let named = text.contains(value) || text.contains(quoted.trim_matches('"'));
            assert!(named && text.contains(variable), "{variable}={value}: {text}");
            assert!(text.contains("detected is"), "{variable}={value}: {text}");
        }
    }
    for (i, variable) in POLICY.iter().enumerate() {
        // The others are numbers of seconds or nodes to somebody.
        let value = ["\u{ff11}", "{}", "true ", "-1"][i % 4];
        let (status, text) = start(world, &[(variable, value)]);
        assert_eq!(status, Some(2), "{variable}={value}: {text}");
        let option = format!("--{}", variable.to_lowercase().replace('_', "-"));
        assert!(text.contains(&option) && text.contains(value), "{variable}={value}: {text}");
    }
    let told = world.look(&[("FLANNEL_VNI", "x"), ("FLANNEL_PORT", "4789")]);
    let reasons: Vec<&str> = told.iter().map(|finding| finding.reason.as_str()).collect();
    assert_eq!(reasons, ["SettingContradictsCluster", "SettingUnreadable"]);
    world.expect_clear();
}
