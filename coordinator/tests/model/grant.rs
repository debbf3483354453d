//! A lease's facts where it doesn't matter what they are.

use flannel_migration_protocol::{CalicoFacts, Epoch, FlannelFacts, Goal, Grant, Strategy};

/// The number and the way are what decisions depend on.
pub fn grant(epoch: Epoch, goal: Goal) -> Grant {
    Grant {
        epoch,
        fence: 1,
        goal,
        strategy: Strategy::Drain,
        budget_seconds: 120,
        keep_seconds: 600,
        flannel: FlannelFacts {
            networks: vec![],
            vni: 1,
            port: 8472,
            mtu: 1450,
            cni_conf_dir: String::new(),
            canal: false,
        },
        calico: CalicoFacts {
            cni_conf_name: String::new(),
            cni_conf_template: String::new(),
            mtu: 1450,
            health_port: 9099,
            kube_service_address: String::new(),
        },
    }
}
