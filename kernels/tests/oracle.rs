//! Every kernel against the oracle, judged by the floor of the contract that it declares.

mod support;

use fused_xent_kernels::Kernel;
use fused_xent_kernels::problem::DType;
use proptest::prelude::*;
use support::*;

/// Every kernel of this machine, with a roomy workspace and with one that forces chunks and recomputing.
fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::available().into_iter().flat_map(|kernel| [kernel.clone(), kernel.with_workspace(TINY)])
}

proptest! {
    #![proptest_config(config(192))]

    #[test]
    fn results_are_at_the_floor(recipe in recipes(100, 70, 700), narrow: bool) {
        let case = recipe.case();
        let dtypes = if narrow { case.dtypes() } else { [DType::F32; 2] };
        for kernel in kernels() {
            let truth = Truth::new(&case, kernel.contract(dtypes[0], dtypes[1]));
            assert_honest(&truth.judge(&case, &case.run(&kernel, dtypes)))?;
            if let [Some(_), None, None] = case.cotangents {
                assert_honest(&truth.judge(&case, &case.run_at_once(&kernel, dtypes)))?;
            }
        }
    }
}
