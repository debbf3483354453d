//! Long lists, read page by page: what is made of one page is all that is kept of it.

use kube::api::{ListMeta, ListParams};
use kube::core::Request;
use kube::{Client, Resource};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::api::{Error, Result, read};

/// So many objects are in memory at once.
const PAGE: u32 = 250;

/// One page. kube's own list reads every object twice, the first time with all that isn't asked for.
#[derive(Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
struct Page<T> {
    #[serde(default)]
    metadata: ListMeta,
    items: Option<Vec<T>>,
}

/// Reads all objects of the kind `K`, each as a `T`, which leaves out what nobody asks for. `what` says it in words, for errors.
pub async fn each<K, T>(client: &Client, what: &str, mut take: impl FnMut(T)) -> Result<()>
where
    K: Resource<DynamicType = ()>,
    T: DeserializeOwned,
{
    let list = Request::new(K::url_path(&(), None));
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let request = list
            .list(&params)
            .map_err(|error| Error::Unexpected { what: what.to_owned(), why: error.to_string() })?;
        let page: Page<T> = read(what, client.request(request)).await?;
        page.items.into_iter().flatten().for_each(&mut take);
        match page.metadata.continue_.filter(|more| !more.is_empty()) {
            Some(more) => params = ListParams::default().limit(PAGE).continue_token(&more),
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read_without_what_nobody_asks_for() {
        #[derive(Deserialize)]
        struct Named {
            name: String,
        }
        let text = r#"{"kind":"List","metadata":{"resourceVersion":"1","continue":"x","remainingItemCount":7},
                       "items":[{"name":"a","more":{"of":["this"]}},{"name":"b"}]}"#;
        let page: Page<Named> = serde_json::from_str(text).unwrap();
        let names: Vec<String> = page.items.unwrap().into_iter().map(|named| named.name).collect();
        assert_eq!((names.join(" ").as_str(), page.metadata.continue_.as_deref()), ("a b", Some("x")));
        let none: Page<Named> = serde_json::from_str(r#"{"metadata":{},"items":null}"#).unwrap();
        assert!(none.items.is_none());
    }
}
