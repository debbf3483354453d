//! What Calico's installer puts in the place of the placeholders in Calico's CNI config template, as far as its manifest decides that. Pure.

use std::collections::BTreeMap;

use flannel_migration_protocol::template::{self, Filling, Placeholder};
use k8s_openapi::api::core::v1::Container;

/// The variables of the installer's container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installer(BTreeMap<String, Source>);

/// Where a variable comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// The manifest says it.
    Value(String),
    /// A key of the ConfigMap that holds the template.
    Key(String),
    /// From elsewhere: it isn't read.
    Elsewhere,
}

impl Installer {
    /// Of this container; `config_map` holds the template.
    #[must_use]
    pub fn of(container: &Container, config_map: &str) -> Self {
        let source = |variable: &k8s_openapi::api::core::v1::EnvVar| match &variable.value_from {
            None => Source::Value(variable.value.clone().unwrap_or_default()),
            Some(from) => match &from.config_map_key_ref {
                Some(key) if key.name == config_map => Source::Key(key.key.clone()),
                _ => Source::Elsewhere,
            },
        };
        let variables = container.env.iter().flatten();
        Self(variables.map(|variable| (variable.name.clone(), source(variable))).collect())
    }

    /// The template, as far as it is the same on every node; what differs from node to node is the agents' to fill in. `data`: of the
    /// ConfigMap that holds it.
    #[must_use]
    pub fn complete(&self, template: &str, data: &BTreeMap<String, String>) -> String {
        let stated = |variable: &str| match self.0.get(variable)? {
            Source::Value(value) => Some(value.clone()),
            Source::Key(key) => data.get(key).cloned(),
            Source::Elsewhere => None,
        };
        template::fill(template, |placeholder: &Placeholder| {
            match (placeholder.variable, placeholder.filling) {
                // Where the host's directory of CNI configs is for its plugin.
                (_, Filling::Kubeconfig) => {
                    stated("CNI_NET_DIR").map(|path| format!("{path}/calico-kubeconfig"))
                }
                (Some(variable), _) if self.0.contains_key(variable) => stated(variable),
                (_, Filling::Text(text)) => Some(text.to_owned()),
                _ => None,
            }
        })
    }

    /// What is left in a completed template because a variable decides that can't be read: placeholders, with their variables.
    #[must_use]
    pub fn unreadable(&self, template: &str) -> Vec<(&'static str, &'static str)> {
        let left = template::PLACEHOLDERS.iter().filter(|placeholder| template.contains(placeholder.mark));
        left.filter_map(|placeholder| Some((placeholder.mark, placeholder.variable?)))
            .filter(|(_, variable)| self.0.contains_key(*variable))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(env: &str, template: &str) -> (String, Vec<&'static str>) {
        let container: Container =
            serde_saphyr::from_str(&format!("{{name: install-cni, env: [{env}]}}")).unwrap();
        let installer = Installer::of(&container, "calico-config");
        let data = BTreeMap::from([("level".to_owned(), "warning".to_owned())]);
        let text = installer.complete(template, &data);
        let unreadable = installer.unreadable(&text).into_iter().map(|(_, variable)| variable).collect();
        (text, unreadable)
    }

    #[test]
    fn variables_decide_and_defaults_where_there_are_none() {
        let template = "__LOG_LEVEL__ __CALICO_API_GROUP__ __REQUIRE_MTU_FILE__ __KUBECONFIG_FILEPATH__";
        let none = "info crd.projectcalico.org/v1 false __KUBECONFIG_FILEPATH__";
        assert_eq!(complete("", template), (none.to_owned(), vec![]));
        let level = "{name: LOG_LEVEL, valueFrom: {configMapKeyRef: {name: calico-config, key: level}}}";
        let more = "{name: REQUIRE_MTU_FILE, value: 'true'}, {name: CNI_NET_DIR, value: /etc/cni/x}";
        let group = "{name: CALICO_API_GROUP, value: projectcalico.org/v3}";
        let all = "warning projectcalico.org/v3 true /etc/cni/x/calico-kubeconfig";
        assert_eq!(complete(&format!("{level}, {more}, {group}"), template), (all.to_owned(), vec![]));
    }

    #[test]
    fn what_differs_from_node_to_node_is_left_to_the_agents() {
        let template = "__KUBERNETES_NODE_NAME__ __CNI_MTU__ __KUBERNETES_SERVICE_HOST__";
        let stock = "{name: KUBERNETES_NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}, {name: CNI_MTU, value: '0'}";
        assert_eq!(complete(stock, template), (template.to_owned(), vec![]));
    }

    #[test]
    fn what_comes_from_elsewhere_is_told_where_it_matters() {
        let elsewhere = "{name: LOG_LEVEL, valueFrom: {configMapKeyRef: {name: another, key: level}}}";
        assert_eq!(complete(elsewhere, "__LOG_LEVEL__"), ("__LOG_LEVEL__".to_owned(), vec!["LOG_LEVEL"]));
        assert_eq!(complete(elsewhere, "info"), ("info".to_owned(), vec![]));
        let missing = "{name: LOG_LEVEL, valueFrom: {configMapKeyRef: {name: calico-config, key: other}}}";
        assert_eq!(complete(missing, "__LOG_LEVEL__").1, ["LOG_LEVEL"]);
    }
}
