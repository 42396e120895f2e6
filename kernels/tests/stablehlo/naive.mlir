module @fused_xent {
  func.func public @main(%hidden: tensor<2x3xbf16>, %unembedding: tensor<5x3xbf16>, %labels: tensor<2xi32>, %cotangent: tensor<2xf32>) -> (tensor<2xf32> {jax.result_info = "loss"}, tensor<2xf32> {jax.result_info = "lse"}, tensor<2xf32> {jax.result_info = "label_logits"}, tensor<2x3xbf16> {jax.result_info = "d_hidden"}, tensor<5x3xbf16> {jax.result_info = "d_unembedding"}) {
    %0 = stablehlo.constant dense<0> : tensor<2xi32>
    %1 = stablehlo.compare GE, %labels, %0, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %2 = stablehlo.broadcast_in_dim %1, dims = [0] : (tensor<2xi1>) -> tensor<2x3xi1>
    %3 = stablehlo.constant dense<0.0> : tensor<2x3xf32>
    %4 = stablehlo.convert %3 : (tensor<2x3xf32>) -> tensor<2x3xbf16>
    %5 = stablehlo.select %2, %hidden, %4 : tensor<2x3xi1>, tensor<2x3xbf16>
    %6 = stablehlo.constant dense<0.0> : tensor<2xf32>
    %7 = stablehlo.select %1, %cotangent, %6 : tensor<2xi1>, tensor<2xf32>
    %8 = stablehlo.constant dense<0xFF800000> : tensor<2xf32>
    %9 = stablehlo.constant dense<0.0> : tensor<2xf32>
    %10 = stablehlo.constant dense<0> : tensor<i32>
    %11 = stablehlo.constant dense<5> : tensor<i32>
    %12 = stablehlo.multiply %10, %11 : tensor<i32>
    %13 = stablehlo.constant dense<0> : tensor<i32>
    %14 = stablehlo.minimum %12, %13 : tensor<i32>
    %15 = stablehlo.constant dense<0> : tensor<i32>
    %16 = stablehlo.dynamic_slice %unembedding, %14, %15, sizes = [5, 3] : (tensor<5x3xbf16>, tensor<i32>, tensor<i32>) -> tensor<5x3xbf16>
    %17 = stablehlo.dot_general %5, %16, contracting_dims = [1] x [1], precision = [HIGHEST, HIGHEST] : (tensor<2x3xbf16>, tensor<5x3xbf16>) -> tensor<2x5xf32>
    %18 = stablehlo.iota dim = 1 : tensor<2x5xi32>
    %19 = stablehlo.broadcast_in_dim %14, dims = [] : (tensor<i32>) -> tensor<2x5xi32>
    %20 = stablehlo.add %18, %19 : tensor<2x5xi32>
    %21 = stablehlo.broadcast_in_dim %labels, dims = [0] : (tensor<2xi32>) -> tensor<2x5xi32>
    %22 = stablehlo.compare EQ, %20, %21, SIGNED : (tensor<2x5xi32>, tensor<2x5xi32>) -> tensor<2x5xi1>
    %23 = stablehlo.constant dense<0xFF800000> : tensor<f32>
    %24 = stablehlo.reduce(%17 init: %23) applies stablehlo.maximum across dimensions = [1] : (tensor<2x5xf32>, tensor<f32>) -> tensor<2xf32>
    %25 = stablehlo.maximum %8, %24 : tensor<2xf32>
    %26 = stablehlo.broadcast_in_dim %25, dims = [0] : (tensor<2xf32>) -> tensor<2x5xf32>
    %27 = stablehlo.subtract %17, %26 : tensor<2x5xf32>
    %28 = stablehlo.exponential %27 : tensor<2x5xf32>
    %29 = stablehlo.constant dense<0.0> : tensor<f32>
    %30 = stablehlo.reduce(%28 init: %29) applies stablehlo.add across dimensions = [1] : (tensor<2x5xf32>, tensor<f32>) -> tensor<2xf32>
    %31 = stablehlo.subtract %8, %25 : tensor<2xf32>
    %32 = stablehlo.exponential %31 : tensor<2xf32>
    %33 = stablehlo.multiply %9, %32 : tensor<2xf32>
    %34 = stablehlo.add %33, %30 : tensor<2xf32>
    %35 = stablehlo.constant dense<0.0> : tensor<2x5xf32>
    %36 = stablehlo.select %22, %17, %35 : tensor<2x5xi1>, tensor<2x5xf32>
    %37 = stablehlo.constant dense<0.0> : tensor<f32>
    %38 = stablehlo.reduce(%36 init: %37) applies stablehlo.add across dimensions = [1] : (tensor<2x5xf32>, tensor<f32>) -> tensor<2xf32>
    %39 = stablehlo.add %9, %38 : tensor<2xf32>
    %40 = stablehlo.log %34 : tensor<2xf32>
    %41 = stablehlo.add %25, %40 : tensor<2xf32>
    %42 = stablehlo.subtract %41, %39 : tensor<2xf32>
    %43 = stablehlo.constant dense<0.0> : tensor<2x3xf32>
    %44 = stablehlo.constant dense<0.0> : tensor<5x3xf32>
    %45 = stablehlo.constant dense<0> : tensor<i32>
    %46 = stablehlo.constant dense<5> : tensor<i32>
    %47 = stablehlo.multiply %45, %46 : tensor<i32>
    %48 = stablehlo.constant dense<0> : tensor<i32>
    %49 = stablehlo.minimum %47, %48 : tensor<i32>
    %50 = stablehlo.constant dense<0> : tensor<i32>
    %51 = stablehlo.dynamic_slice %unembedding, %49, %50, sizes = [5, 3] : (tensor<5x3xbf16>, tensor<i32>, tensor<i32>) -> tensor<5x3xbf16>
    %52 = stablehlo.dot_general %5, %51, contracting_dims = [1] x [1], precision = [HIGHEST, HIGHEST] : (tensor<2x3xbf16>, tensor<5x3xbf16>) -> tensor<2x5xf32>
    %53 = stablehlo.iota dim = 1 : tensor<2x5xi32>
    %54 = stablehlo.broadcast_in_dim %49, dims = [] : (tensor<i32>) -> tensor<2x5xi32>
    %55 = stablehlo.add %53, %54 : tensor<2x5xi32>
    %56 = stablehlo.broadcast_in_dim %labels, dims = [0] : (tensor<2xi32>) -> tensor<2x5xi32>
    %57 = stablehlo.compare EQ, %55, %56, SIGNED : (tensor<2x5xi32>, tensor<2x5xi32>) -> tensor<2x5xi1>
    %58 = stablehlo.broadcast_in_dim %41, dims = [0] : (tensor<2xf32>) -> tensor<2x5xf32>
    %59 = stablehlo.subtract %52, %58 : tensor<2x5xf32>
    %60 = stablehlo.exponential %59 : tensor<2x5xf32>
    %61 = stablehlo.broadcast_in_dim %7, dims = [0] : (tensor<2xf32>) -> tensor<2x5xf32>
    %62 = stablehlo.multiply %60, %61 : tensor<2x5xf32>
    %63 = stablehlo.broadcast_in_dim %7, dims = [0] : (tensor<2xf32>) -> tensor<2x5xf32>
    %64 = stablehlo.constant dense<0.0> : tensor<2x5xf32>
    %65 = stablehlo.select %57, %63, %64 : tensor<2x5xi1>, tensor<2x5xf32>
    %66 = stablehlo.subtract %62, %65 : tensor<2x5xf32>
    %67 = stablehlo.reduce_precision %66, format = e8m7 : tensor<2x5xf32>
    %68 = stablehlo.convert %67 : (tensor<2x5xf32>) -> tensor<2x5xbf16>
    %69 = stablehlo.dot_general %68, %51, contracting_dims = [1] x [0], precision = [HIGHEST, HIGHEST] : (tensor<2x5xbf16>, tensor<5x3xbf16>) -> tensor<2x3xf32>
    %70 = stablehlo.add %43, %69 : tensor<2x3xf32>
    %71 = stablehlo.convert %67 : (tensor<2x5xf32>) -> tensor<2x5xbf16>
    %72 = stablehlo.dot_general %71, %5, contracting_dims = [0] x [0], precision = [HIGHEST, HIGHEST] : (tensor<2x5xbf16>, tensor<2x3xbf16>) -> tensor<5x3xf32>
    %73 = stablehlo.constant dense<0> : tensor<i32>
    %74 = stablehlo.dynamic_slice %44, %49, %73, sizes = [5, 3] : (tensor<5x3xf32>, tensor<i32>, tensor<i32>) -> tensor<5x3xf32>
    %75 = stablehlo.add %74, %72 : tensor<5x3xf32>
    %76 = stablehlo.dynamic_update_slice %44, %75, %49, %73 : (tensor<5x3xf32>, tensor<5x3xf32>, tensor<i32>, tensor<i32>) -> tensor<5x3xf32>
    %77 = stablehlo.convert %70 : (tensor<2x3xf32>) -> tensor<2x3xbf16>
    %78 = stablehlo.convert %76 : (tensor<5x3xf32>) -> tensor<5x3xbf16>
    %79 = stablehlo.constant dense<0.0> : tensor<2xf32>
    %80 = stablehlo.select %1, %42, %79 : tensor<2xi1>, tensor<2xf32>
    %81 = stablehlo.constant dense<0.0> : tensor<2xf32>
    %82 = stablehlo.select %1, %41, %81 : tensor<2xi1>, tensor<2xf32>
    %83 = stablehlo.constant dense<0.0> : tensor<2xf32>
    %84 = stablehlo.select %1, %39, %83 : tensor<2xi1>, tensor<2xf32>
    return %80, %82, %84, %77, %78 : tensor<2xf32>, tensor<2xf32>, tensor<2xf32>, tensor<2x3xbf16>, tensor<5x3xbf16>
  }
}
