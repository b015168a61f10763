//! The service accounts of pods without Kubernetes. A node proxy identifies a pod by namespace, name and service account: a
//! ztunnel resets a pod's connections if its workload has another account than the agent announced.

use std::str::FromStr;

use redirect_protocol::pod::PodIdentity;

/// The longest name that Kubernetes allows.
const LONGEST: usize = 253;

/// The service account of some pods, as `NAMESPACE/NAME=ACCOUNT`. A `*` at the end of the pods' name stands for anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    pods: String,
    account: String,
}

/// Why a text is not a rule for service accounts.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NoServiceAccount {
    /// There is no `=`, or nothing before it.
    #[error("write NAMESPACE/NAME=ACCOUNT, such as shop/cart=cart, shop/*=shop or *=default")]
    Shape,
    /// A `*` in the middle matches nothing.
    #[error("{0:?}: a * can only be the last character before the =")]
    Wildcard(String),
    /// No service account can have this name.
    #[error(
        "{0:?} is no name of a service account: write lower-case letters, digits, - and ., at most {LONGEST} characters"
    )]
    Account(String),
}

impl FromStr for ServiceAccount {
    type Err = NoServiceAccount;

    fn from_str(text: &str) -> Result<Self, NoServiceAccount> {
        let (pods, account) = text.trim().split_once('=').ok_or(NoServiceAccount::Shape)?;
        if pods.is_empty() {
            return Err(NoServiceAccount::Shape);
        }
        if pods.trim_end_matches('*').len() + 1 < pods.len() || pods.trim_end_matches('*').contains('*') {
            return Err(NoServiceAccount::Wildcard(pods.into()));
        }
        let of_a_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        if account.is_empty() || account.len() > LONGEST || !account.chars().all(of_a_name) {
            return Err(NoServiceAccount::Account(account.into()));
        }
        Ok(Self { pods: pods.into(), account: account.into() })
    }
}

impl ServiceAccount {
    fn is_of(&self, pod: &str) -> bool {
        match self.pods.strip_suffix('*') {
            Some(beginning) => pod.starts_with(beginning),
            None => pod == self.pods,
        }
    }
}

/// The pod with its service account: the runtime's, or that of the first rule that matches.
pub(crate) fn complete(pod: &PodIdentity, accounts: &[ServiceAccount]) -> PodIdentity {
    let mut pod = pod.clone();
    if pod.service_account.is_empty() {
        let name = pod.to_string();
        let mapped = accounts.iter().find(|account| account.is_of(&name));
        pod.service_account = mapped.map(|account| account.account.clone()).unwrap_or_default();
    }
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_matches_counts_unless_the_runtime_names_one() {
        let accounts: Vec<ServiceAccount> =
            ["shop/cart=one", "shop/cart-*=two", "shop/*=three", "c1=four", "*=five"]
                .iter()
                .map(|text| text.parse().unwrap())
                .collect();
        let of = |namespace: &str, name: &str, accounts: &[ServiceAccount]| {
            let pod =
                PodIdentity { namespace: namespace.into(), name: name.into(), ..PodIdentity::default() };
            complete(&pod, accounts).service_account
        };
        for (namespace, name, account) in [
            ("shop", "cart", "one"),
            ("shop", "cart-7", "two"),
            ("shop", "till", "three"),
            ("", "c1", "four"),
            ("", "c2", "five"),
            ("shopping", "cart", "five"),
        ] {
            assert_eq!(of(namespace, name, &accounts), account, "{namespace}/{name}");
        }
        assert_eq!(of("shop", "cart", &[]), "");
        let named = PodIdentity { service_account: "own".into(), ..PodIdentity::default() };
        assert_eq!(complete(&named, &accounts), named);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_a_remedy() {
        for (text, remedy) in [
            ("shop/cart", "shop/cart=cart"),
            ("=cart", "shop/cart=cart"),
            ("sh*p/cart=cart", "last character"),
            ("**=cart", "last character"),
            ("shop/*=", "lower-case"),
            ("shop/*=Cart", "lower-case"),
            ("shop/*=a b", "lower-case"),
            (&format!("*={}", "a".repeat(254)), "253"),
        ] {
            let error = text.parse::<ServiceAccount>().unwrap_err().to_string();
            assert!(error.contains(remedy), "{text}: {error}");
        }
    }
}
