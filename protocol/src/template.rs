//! Calico's CNI config template, and what takes the place of its `__PLACEHOLDERS__`.
//!
//! Calico's installer (`cni-plugin/pkg/install`) fills a template on each node, from variables of its container and from what it finds on
//! the node. An agent does the same before the installer runs there. What the manifest sets by variables, and what the installer takes
//! unless it is told otherwise, is the same on every node: the coordinator fills it in, and the agents fill in the rest.

/// What is put in the place of a placeholder, unless the manifest says it by a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filling {
    /// This text, on every node.
    Text(&'static str),
    /// The node's name.
    NodeName,
    /// Path of the plugin's kubeconfig on the node.
    Kubeconfig,
    /// MTU of pods.
    Mtu,
    /// Address of the API server's Service.
    ServiceHost,
    /// Its port.
    ServicePort,
}

/// A placeholder that Calico's installer knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placeholder {
    /// Its text.
    pub mark: &'static str,
    /// The variable of the installer's container that decides, if one does.
    pub variable: Option<&'static str>,
    /// What else is put there.
    pub filling: Filling,
}

const fn set(mark: &'static str, variable: &'static str, filling: Filling) -> Placeholder {
    Placeholder { mark, variable: Some(variable), filling }
}

const fn plain(mark: &'static str, filling: Filling) -> Placeholder {
    Placeholder { mark, variable: None, filling }
}

/// All placeholders that Calico's installer knows up to 3.33, but for `__SERVICEACCOUNT_TOKEN__`: the token is the installer's own, and
/// nobody else has it. `__CALICO_API_GROUP__` and `__REQUIRE_MTU_FILE__` came with 3.32.
///
/// Of node name and MTU the manifest's variables say where they come from, the node and flannel, not what they are. Files of a datastore
/// in etcd are on no node that is migrated.
pub const PLACEHOLDERS: &[Placeholder] = &[
    set("__LOG_LEVEL__", "LOG_LEVEL", Filling::Text("info")),
    set("__LOG_FILE_PATH__", "LOG_FILE_PATH", Filling::Text("/var/log/calico/cni/cni.log")),
    set("__LOG_FILE_MAX_SIZE__", "LOG_FILE_MAX_SIZE", Filling::Text("100")),
    set("__LOG_FILE_MAX_AGE__", "LOG_FILE_MAX_AGE", Filling::Text("30")),
    set("__LOG_FILE_MAX_COUNT__", "LOG_FILE_MAX_COUNT", Filling::Text("10")),
    set("__DATASTORE_TYPE__", "DATASTORE_TYPE", Filling::Text("kubernetes")),
    plain("__KUBERNETES_NODE_NAME__", Filling::NodeName),
    plain("__KUBECONFIG_FILEPATH__", Filling::Kubeconfig),
    plain("__CNI_MTU__", Filling::Mtu),
    set("__KUBERNETES_SERVICE_HOST__", "KUBERNETES_SERVICE_HOST", Filling::ServiceHost),
    set("__KUBERNETES_SERVICE_PORT__", "KUBERNETES_SERVICE_PORT", Filling::ServicePort),
    set("__CALICO_API_GROUP__", "CALICO_API_GROUP", Filling::Text("crd.projectcalico.org/v1")),
    plain("__ETCD_CERT_FILE__", Filling::Text("")),
    plain("__ETCD_CA_CERT_FILE__", Filling::Text("")),
    plain("__ETCD_KEY_FILE__", Filling::Text("")),
    set("__ETCD_ENDPOINTS__", "ETCD_ENDPOINTS", Filling::Text("")),
    set("__ETCD_DISCOVERY_SRV__", "ETCD_DISCOVERY_SRV", Filling::Text("")),
    set("__REQUIRE_MTU_FILE__", "REQUIRE_MTU_FILE", Filling::Text("false")),
];

/// The template with each known placeholder replaced by what `value` has for it; the others stay.
#[must_use]
pub fn fill(template: &str, value: impl Fn(&Placeholder) -> Option<String>) -> String {
    let mut text = template.to_owned();
    for placeholder in PLACEHOLDERS {
        if text.contains(placeholder.mark)
            && let Some(value) = value(placeholder)
        {
            text = text.replace(placeholder.mark, &value);
        }
    }
    text
}

/// The placeholders that nobody fills, each once: `__`, capitals, digits and `_`, `__`.
#[must_use]
pub fn unknown(template: &str) -> Vec<String> {
    // Two may touch each other: what is known goes first.
    let rest = fill(template, |_| Some(" ".to_owned()));
    let within = |letter: char| letter == '_' || letter.is_ascii_uppercase() || letter.is_ascii_digit();
    let placeholder = |word: &str| {
        let end = word.rfind("__")?.checked_add(2)?;
        let word = word.get(word.find("__")?..end)?;
        (!word.trim_matches('_').is_empty()).then(|| word.to_owned())
    };
    let mut found: Vec<String> = rest
        .split(|letter| !within(letter))
        .filter_map(placeholder)
        .filter(|word| word.starts_with("__") && word.len() > 4)
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_that_nobody_fills_are_found_wherever_they_are_and_nothing_else() {
        let text = r#"{"a": "__B__", "c": __CNI_MTU__, "d": "x__IPV6_2__y", "e": "__lower__", "f": "____", "g": "A__B", "h": "__B__",
            "i": "__KUBERNETES_SERVICE_HOST____KUBERNETES_SERVICE_PORT__"}"#;
        assert_eq!(unknown(text), ["__B__", "__IPV6_2__"]);
        assert_eq!(unknown("__SERVICEACCOUNT_TOKEN__"), ["__SERVICEACCOUNT_TOKEN__"]);
    }

    #[test]
    fn what_has_no_value_yet_stays() {
        let value = |placeholder: &Placeholder| match placeholder.filling {
            Filling::Text(text) => Some(text.to_owned()),
            _ => None,
        };
        let text =
            fill(r#"["__CALICO_API_GROUP__", __REQUIRE_MTU_FILE__, "__KUBERNETES_NODE_NAME__"]"#, value);
        assert_eq!(text, r#"["crd.projectcalico.org/v1", false, "__KUBERNETES_NODE_NAME__"]"#);
        assert!(unknown(&text).is_empty());
    }

    #[test]
    fn every_placeholder_is_filled_in_one_way() {
        for placeholder in PLACEHOLDERS {
            assert_eq!(PLACEHOLDERS.iter().filter(|other| other.mark == placeholder.mark).count(), 1);
            assert_eq!(fill(placeholder.mark, |_| Some("x".to_owned())), "x", "{}", placeholder.mark);
        }
    }
}
